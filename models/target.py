"""What a model must offer to be a target or a draft model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from models.batch import RaggedBatch
from models.kv_cache import KVCache, KVSpec


@dataclass(frozen=True)
class Top:
    """The k likeliest tokens at W nodes, best first."""

    ids: Tensor  # [W, k] int64
    logits: Tensor  # [W, k] float32, raw: no bias, no penalties, no temperature


@dataclass(frozen=True)
class ForwardOutput:
    """Result of one forward pass."""

    hidden: Tensor  # [T, H] after the final norm: exactly what the LM head is fed
    taps: dict[int, Tensor] = field(default_factory=dict)  # tap i -> [T, H], the residual stream that enters layer i
    top: Top | None = None  # at the wanted tokens; added by the step where a drafter learns from it


class CausalModel(Protocol):
    """A causal LM over ragged batches and a paged cache. Holds weights, never request state."""

    vocab_size: int  # rows of the LM head; may exceed the tokenizer's
    hidden_size: int
    num_layers: int
    max_model_len: int  # positions that RoPE (or the position table) is ready for
    kv_spec: KVSpec
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """Write the batch's K/V into ``cache`` and return hidden states of all its query tokens."""
        ...

    def new_cache(self, num_pages: int) -> KVCache:
        """Empty K/V of this model for ``num_pages`` pages."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H], rows of the embedding matrix: what drafters that share it are fed."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[W, H] -> [W, V], float32 (float64 for float64 weights), final soft cap and scaling included."""
        ...


Trunk = Callable[[RaggedBatch, KVCache], Tensor]
"""A pass through a model's first layers: [T, H] what its final norm makes of the stream that leaves them.

It writes the K/V of these layers, and of no other, into the model's own cache.
"""


@runtime_checkable
class ExitingModel(CausalModel, Protocol):
    """A model that can stop after some of its layers."""

    @property
    def layer_size(self) -> int:
        """Weights of one layer, about: what a pass through it costs beside the LM head."""
        ...

    def exit_after(self, layers: int) -> Trunk:
        """The first ``layers`` layers as a pass of their own, over the same weights.

        Raises:
            ValueError: fewer than one layer or more than there are; a model that does not work cut short.
        """
        ...


def check_exit(layers: int, num_layers: int) -> None:
    """Raise ValueError unless a model of ``num_layers`` layers can stop after ``layers``."""
    if not 1 <= layers <= num_layers:
        raise ValueError(f"there is no exit after layer {layers}: the model has layers 1 .. {num_layers}")
