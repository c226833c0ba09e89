"""How the parts of a step are computed on a device. What is chosen here changes what a step costs, never its text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decoding.cache import Moves, all_moves
from decoding.sampling_ops import SamplingOps, load_sampling_ops
from models.tree_ops import TreeOps, load_tree_ops


@dataclass(frozen=True)
class StepOps:
    """One implementation of each."""

    tree: TreeOps
    sampling: SamplingOps
    moves: Moves | None  # None: as ``SequenceCache`` does it by itself


def load_step_ops(device: torch.device) -> StepOps:
    """The best for a device. On CUDA the host waits for a step once; on a CPU a wait costs nothing, and work does."""
    moves = None if device.type == "cpu" else all_moves
    return StepOps(load_tree_ops(device), load_sampling_ops(device), moves)
