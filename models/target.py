"""What a model must offer to be a target or a draft model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

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

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H], rows of the embedding matrix: what drafters that share it are fed."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[W, H] -> [W, V], float32 (float64 for float64 weights), final soft cap and scaling included."""
        ...
