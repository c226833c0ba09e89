"""Between host and device in one copy each way. On CUDA no copy makes the host wait, but for reading the result.

The many small tensors of a step travel packed: a copy costs some microseconds whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; of every part, so that it can be viewed in its dtype


@dataclass(frozen=True)
class Part:
    """Where one tensor lies among the bytes of a packed copy."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, packed: Tensor) -> Tensor:
        """The tensor, a view into ``packed`` [bytes] uint8."""
        return packed[self.start : self.stop].view(self.dtype).view(self.shape)


Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def layout(tensors: Iterable[Tensor]) -> tuple[list[Part], int]:
    """Where each tensor lies in a packed copy of all, and the bytes of it."""
    return layout_of((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def layout_of(kinds: Iterable[Kind]) -> tuple[list[Part], int]:
    """``layout`` of tensors that are not there yet."""
    parts, total = [], 0
    for shape, dtype in kinds:
        size = math.prod(shape) * dtype.itemsize
        parts.append(Part(total, total + size, shape, dtype))
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return parts, total


def pack(tensors: list[Tensor], parts: list[Part], packed: Tensor) -> None:
    """Write the bytes of tensors to their places in ``packed`` [bytes] uint8, in one launch on CUDA."""
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    torch._foreach_copy_([packed[part.start : part.stop] for part in parts], flat)


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The arrays as tensors on the device, of their own shapes and dtypes; on the CPU they share memory."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    parts, total = layout(tensors)
    packed = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    pack(tensors, parts, packed)
    there = packed.to(device, non_blocking=True)  # the allocator keeps the pinned memory until the copy is done
    return [part.of(there) for part in parts]


def fetch(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Start to copy tensors of one device to the host; calling what is returned waits for them."""
    if tensors[0].device.type == "cpu":
        return lambda: [tensor.numpy() for tensor in tensors]
    parts, total = layout(tensors)
    packed = torch.empty(total, dtype=torch.uint8, device=tensors[0].device)
    pack(list(tensors), parts, packed)
    here = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    here.copy_(packed, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> list[np.ndarray]:
        done.synchronize()
        return [part.of(here).numpy() for part in parts]

    return wait
