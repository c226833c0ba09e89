"""What a recipe is: a module, its loss on a batch of windows, and how the result is written.

A recipe is one file in training/recipes and one line in its table; the trainer knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from decoding.text import Tokenizer


@dataclass(frozen=True)
class Windows:
    """A batch of token windows on the training device."""

    tokens: Tensor  # [B, S] int64
    counts: Tensor  # [B, S] bool: the token is a label (generated or real text, not a prompt)


@dataclass(frozen=True)
class Losses:
    """What one batch gave."""

    total: Tensor  # [] to backward through
    metrics: dict[str, Tensor]  # [] each; "accuracy@1" and "loss@1" are of the first drafted token


class Recipe(Protocol):
    """Trains ``module``. Everything frozen (the target) is kept outside of it."""

    module: nn.Module

    def loss(self, windows: Windows) -> Losses:
        """The loss of a batch and what to report; called under autocast, and without gradients for validation."""
        ...

    def save(self, folder: Path) -> None:
        """Write the public format into an existing empty folder, complete, so that ``--speculate`` loads it."""
        ...


@dataclass(frozen=True)
class TrainContext:
    """What a recipe is built from."""

    target: Path | None  # folder of the target; None for recipes that have none
    tokenizer: Tokenizer
    tokenizer_folder: Path
    device: torch.device
    autocast: torch.dtype | None  # dtype of the forward pass; None: float32
    window: int  # tokens of a window
    seed: int
    corpus: np.ndarray  # [tokens] ids of all training text, for statistics of the vocabulary
    checkpointing: bool  # recompute activations in the backward pass


@dataclass(frozen=True)
class RecipeKind:
    """One line of the table."""

    options: type  # frozen dataclass; its fields are flags of ``saccade train NAME``
    build: Callable[[Any, TrainContext], Recipe]
    help: str
    needs_target: bool = True
