"""The K/V of one model: a tensor of slots per layer, indexed by the page pool's page ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.batch import PAGE_SIZE


@dataclass(frozen=True)
class KVSpec:
    """The shape of one model's K/V."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    ranks: int = 1  # processes each of which holds K/V of this shape

    def bytes_per_page(self, dtype: torch.dtype) -> int:
        return self.num_layers * PAGE_SIZE * self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVCache:
    """K/V slots of every layer of one model. Slot = page * PAGE_SIZE + offset. It owns tensors, never page ids.

    Args:
        num_pages: of the pool. There is one page more, ``scratch_page``, for writes and moves that nobody reads.

    Attributes:
        shared: other ranks hold the other heads, and only ``move`` has them moved, too.
    """

    shared = False

    def __init__(self, spec: KVSpec, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.scratch_page = num_pages
        slots = (num_pages + 1) * PAGE_SIZE
        self.keys = _zeros((spec.num_layers, slots, spec.num_kv_heads, spec.key_dim), dtype, device)  # [L, S, Hkv, D]
        self.values = _zeros((spec.num_layers, slots, spec.num_kv_heads, spec.value_dim), dtype, device)
        # views made once: indexing a tensor costs a microsecond or two, every layer of every step
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys [S, Hkv, D], values [S, Hkv, Dv]) of one layer, views into the cache."""
        return self._layers[index]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys [T, Hkv, D] and values [T, Hkv, Dv] at slots [T]."""
        key_slots, value_slots = self._layers[layer]
        key_slots[slots] = keys
        value_slots[slots] = values

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` [M] to ``target`` [M] in every layer; ranges may overlap."""
        # half the time of advanced indexing on a CPU
        self.keys.index_copy_(1, target, self.keys.index_select(1, source))
        self.values.index_copy_(1, target, self.values.index_select(1, source))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU such that memory is taken only as pages are first written (torch.zeros writes it all)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
