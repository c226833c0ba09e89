"""What the machine allows: a step of plain decoding reads every weight once, and computes two operations with each.

Memory bounds few rows, arithmetic bounds many; both are measured on the machine that is compared with them.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import Checkpoint
from models.target import CausalModel

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
SIDE = 2048  # of the square matrices whose product measures arithmetic
PRODUCTS = 7


@dataclass(frozen=True)
class Roofline:
    """A model on a machine."""

    weights: int  # numbers that a step reads: all but the rows of an embedding that is no head
    weight_bytes: int
    kv_bytes: int  # K/V of one token
    read_bandwidth: float  # bytes a second, measured
    flops: float  # operations a second of a large product in the model's dtype, measured

    def step_seconds(self, rows: int, context: int, queries: int = 1) -> float:
        """The least that a step of ``rows`` rows with ``queries`` query tokens each can take."""
        memory = (self.weight_bytes + rows * context * self.kv_bytes) / self.read_bandwidth
        return max(memory, 2 * self.weights * rows * queries / self.flops)

    def tokens_per_second(self, rows: int, context: int) -> float:
        """The most that plain decoding can make."""
        return rows / self.step_seconds(rows, context)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weights_read(folder: Path) -> int:
    """How many numbers a step of plain decoding reads.

    Raises:
        CheckpointError: no checkpoint.
    """
    shapes = Checkpoint.open(folder).shapes
    separate_head = any(name.endswith(HEAD) for name in shapes)
    return sum(math.prod(shape) for name, shape in shapes.items() if not (separate_head and name.endswith(EMBEDDING)))


def roofline_of(folder: Path, target: CausalModel, read_bandwidth: float) -> Roofline:
    """Of a loaded model; measures the arithmetic.

    Args:
        read_bandwidth: bytes a second, with the threads that the model computes with.
    """
    weights, spec = weights_read(folder), target.kv_spec
    return Roofline(
        weights=weights,
        weight_bytes=weights * target.dtype.itemsize,
        kv_bytes=spec.num_layers * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * target.dtype.itemsize,
        read_bandwidth=read_bandwidth,
        flops=matmul_flops(target.dtype, target.device),
    )


def matmul_flops(dtype: torch.dtype, device: torch.device, side: int = SIDE) -> float:
    """Operations a second of a square product: the best of a few."""
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    times = [_timed(a, b) for _ in range(PRODUCTS)]
    return 2 * side**3 / min(times[1:])


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second, read and written ones counted, that a copy in the device's memory moves: the median of a few."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    goal = torch.empty_like(source)
    times = []
    for _ in range(PRODUCTS):
        started = _now(device)
        goal.copy_(source)
        times.append(_now(device) - started)
    return 2 * size / statistics.median(times[1:])


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    started = _now(a.device)
    a @ b
    return _now(a.device) - started


def _now(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
