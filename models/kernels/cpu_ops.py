"""The operations of a decoder layer, fused for CPUs."""

from __future__ import annotations

from torch import Tensor

from models import kernels

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # numbers of layer_ops.cpp


class CpuOps:
    """``LayerOps`` by ``torch.ops.saccade``, without gradients. float32, bfloat16, float16 and float64.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self) -> None:
        ops = kernels.required()
        # looked up once; called by position, since each microsecond counts 40 times a step
        self.rms_norm = ops.rms_norm.default
        self.rotate_and_store = ops.rotate_and_store.default
        self._add_rms_norm = ops.add_rms_norm.default
        self._gated = ops.gated.default

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``LayerOps``; the sum overwrites ``residual``."""
        return self._add_rms_norm(x, residual, weight, eps), residual

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        return self._gated(gate_up, ACTIVATIONS[activation])  # type: ignore[no-any-return]
