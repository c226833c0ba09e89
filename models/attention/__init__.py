"""Attention backends. A backend is one file and one line in ``BACKENDS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from models import kernels
from models.batch import RaggedBatch
from models.kernels import triton as triton_kernels


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention computes, beside its tensors."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None  # a key is seen while query position - key position < window
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    first_key: int = 0  # keys with a smaller logical index do not exist (drafters that pair feature t-1 with token t)


class AttentionBackend(Protocol):
    """Attention of a ragged batch over the paged cache (which already holds the batch's own K/V)."""

    def __call__(
        self,
        query: Tensor,  # [T, Hq, D]
        keys: Tensor,  # [S, Hkv, D]
        values: Tensor,  # [S, Hkv, Dv]
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: Tensor | None = None,  # [Hq], one more logit per head in the softmax's denominator
    ) -> Tensor:  # [T, Hq, Dv]
        ...


def _reference(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    from models.attention.reference import attend

    return attend


def _cpu(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    from models.attention.cpu import CpuAttention

    return CpuAttention()


def _triton(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    triton_kernels.require(device, dtype)
    from models.attention.triton import load

    return load(device)


BACKENDS: dict[str, Callable[[torch.device, torch.dtype], AttentionBackend]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
}


def load_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend called ``name``; "auto" takes the best one that works for this device and dtype.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: the backend was named and does not work here.
    """
    table = {known: partial(make, device, dtype) for known, make in BACKENDS.items()}
    general = "triton" if name == "auto" and triton_kernels.serves(device, dtype) else "reference"
    return kernels.pick("attention backend", table, name, general, kernels.serves(device, dtype))
