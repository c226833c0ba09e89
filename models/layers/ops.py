"""The element-wise operations of a decoder layer, behind one protocol so that a device can fuse them.

``TorchOps`` runs anywhere and defines what is correct; ``models/kernels`` has the fused ones for CPUs and for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.kernels import triton as triton_kernels


class LayerOps(Protocol):
    """Arithmetic inside is at least float32; results have the dtype of ``x``."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., H] / rms(x) * weight [H]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); both [T, H]. May reuse the memory of ``residual``."""
        ...

    def rotate_and_store(
        self,
        query: Tensor,  # [T, Hq, D], may be a strided view of the fused QKV
        key: Tensor,  # [T, Hkv, D]
        value: Tensor,  # [T, Hkv, Dv]
        rope: Tensor,  # [rows, 2, rot / 2] cos and sin of each position, scaled; float32, or float64 for float64 models
        positions: Tensor,  # [T] int64
        slots: Tensor,  # [T] int64
        keys: Tensor,  # [S, Hkv, D] the layer's cache
        values: Tensor,  # [S, Hkv, Dv]
    ) -> Tensor:
        """Rotate query and key, store key and value; the rotated query [T, Hq, D].

        Halves convention; dims beyond ``rot`` pass through.
        """
        ...

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """[T, 2F] = (gate, up) -> activation(gate) * up [T, F]; activation is "silu", "gelu" or "gelu_tanh"."""
        ...


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class TorchOps:
    """The operations in plain PyTorch, on any device and dtype."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight.to(wide.dtype)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

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
        cos, sin = rope[positions].unsqueeze(2).unbind(1)  # [T, 1, rot / 2] each
        keys[slots] = rotate(key, cos, sin)
        values[slots] = value
        return rotate(query, cos, sin)

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the halves convention: x [T, heads, D], cos and sin [T, 1, rot / 2]; dims beyond rot pass through."""
    half = cos.shape[-1]
    wide = x.to(cos.dtype)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def _torch(device: torch.device, dtype: torch.dtype) -> LayerOps:
    return TorchOps()


def _cpu(device: torch.device, dtype: torch.dtype) -> LayerOps:
    from models.kernels.cpu_ops import CpuOps

    return CpuOps()


def _triton(device: torch.device, dtype: torch.dtype) -> LayerOps:
    triton_kernels.require(device, dtype)
    from models.layers.triton_ops import TritonOps

    return TritonOps()


OPS: dict[str, Callable[[torch.device, torch.dtype], LayerOps]] = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": _triton,
}


def load_ops(device: torch.device, dtype: torch.dtype, name: str = "auto") -> LayerOps:
    """The operations called ``name``; "auto" takes the best that work for this device and dtype.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: the operations were named and do not work here.
    """
    table = {known: partial(make, device, dtype) for known, make in OPS.items()}
    general = "triton" if name == "auto" and triton_kernels.serves(device, dtype) else "torch"
    return kernels.pick("layer operations", table, name, general, kernels.serves(device, dtype))
