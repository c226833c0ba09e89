"""The operations of a decoder layer on CUDA, each one Triton kernel (models/kernels/triton/layer_ops.py)."""

from __future__ import annotations

from torch import Tensor

from models.kernels.triton import layer_ops as kernels
from models.layers.ops import ACTIVATIONS

TILE = 512  # numbers that a program handles at once, where rows are shorter
GATED_BLOCK = 1024
HEADS = 4  # heads of a token that one program rotates


class TritonOps:
    """``LayerOps`` without gradients, for float32, bfloat16 and float16."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``LayerOps``; x [T, H] or [T, heads, D], whose last dimension is contiguous."""
        if x.dim() not in (2, 3) or x.stride(-1) != 1:
            return self.rms_norm(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps).view(x.shape)
        width, heads = x.shape[-1], 1 if x.dim() == 2 else x.shape[1]
        rows, block, grid, num_warps = _rows(x.shape[0] * heads, width)
        out = x.new_empty(x.shape)
        kernels.rms_norm[grid](
            x,
            weight,
            out,
            x.shape[0] * heads,
            x.stride(0),
            x.stride(-2),
            HEADS=heads,
            EPS=eps,
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``LayerOps``; the sum overwrites ``residual``."""
        x = x.contiguous()
        total = residual.contiguous()
        count, width = x.shape
        rows, block, grid, num_warps = _rows(count, width)
        out = x.new_empty(x.shape)
        kernels.add_rms_norm[grid](
            x,
            total,
            weight,
            out,
            count,
            EPS=eps,
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        return out, total

    def rotate_and_store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rope: Tensor,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """See ``LayerOps``."""
        query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        tokens, heads, dim = query.shape
        kv_heads, value_dim, half = key.shape[1], value.shape[2], rope.shape[2]
        turned = query.new_empty(query.shape)
        groups = -(-heads // HEADS) + -(-kv_heads // HEADS)
        kernels.rotate_and_store[(tokens, groups)](
            query,
            key,
            value,
            rope,
            positions,
            slots,
            keys,
            values,
            turned,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            QUERIES=heads,
            KEYS=kv_heads,
            DIM=dim,
            VALUE_DIM=value_dim,
            HALF=half,
            HALF_BLOCK=_power(half),
            REST_BLOCK=_power(max(dim - 2 * half, 1)),
            VALUE_BLOCK=_power(value_dim),
            HEADS=HEADS,
            num_warps=2,
            enable_fp_fusion=True,
        )
        return turned

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """See ``LayerOps``.

        Raises:
            KeyError: an unknown activation.
        """
        if activation not in ACTIVATIONS:
            raise KeyError(activation)
        if gate_up.stride(1) != 1:
            gate_up = gate_up.contiguous()
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((tokens, width))
        kernels.gated[(tokens, -(-width // GATED_BLOCK))](
            gate_up,
            out,
            gate_up.stride(0),
            WIDTH=width,
            ACTIVATION=activation,
            BLOCK=GATED_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return out


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _rows(count: int, width: int) -> tuple[int, int, tuple[int], int]:
    """How ``count`` rows are cut: rows of a program, their padded width, the grid and the warps of a program.

    All but the grid follow from the width, so that a row's sum has the same order in every batch.
    """
    block = _power(width)
    rows = max(1, TILE // block)
    return rows, block, (-(-count // rows),), min(max(rows * block // 512, 1), 8)
