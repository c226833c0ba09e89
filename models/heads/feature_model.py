"""What a drafter's model that continues from the target's features must offer: EAGLE, MTP.

Entry t of its context pairs the target's feature of token t - 1 with token t, so an entry depends on nothing after
its own token. The entry's K/V is stored at slot t with RoPE position t - 1, as such models are trained, and slot 0 has
none: attention starts at key 1 (``AttentionSpec.first_key``). While drafting, a node takes what its parent's pass gave
(``carry``) in place of the target's feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.batch import RaggedBatch
from models.kv_cache import KVCache, KVSpec


@dataclass(frozen=True)
class FeatureSource:
    """Which of the target's hidden states make a feature: the taps in order, or the output of the final norm."""

    taps: tuple[int, ...] = ()  # ForwardOutput.taps; () is ForwardOutput.hidden


@dataclass(frozen=True)
class Drafted:
    """Result of one pass over T tokens."""

    hidden: Tensor  # [T, H], what ``logits`` takes
    carry: Tensor  # [T, C], what the passes of the token's children take


class FeatureModel(Protocol):
    """Holds weights, never request state. Batches are the target's, but for positions (see above)."""

    source: FeatureSource
    feature_size: int  # F, width of a feature
    carry_size: int  # C
    continues: bool  # ``catch_up`` reads ``before``: the model has modules that run on each other's outputs
    kv_spec: KVSpec
    max_positions: int
    token_ids: Tensor | None  # [Vd] int64, the target's id of each entry of a draft vocabulary; None: the target's own
    dtype: torch.dtype
    device: torch.device

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        """Write the entries of committed tokens.

        Args:
            batch: chains only.
            features: [T, F] the target's features of the tokens before each.
            before: [R, C] the carry of the entry before each row's first; zeros where there is none. None if the
                model does not ask for it.
        """
        ...

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        """A pass over draft nodes ``depth`` >= 1 below the root, from their parents' carry [T, C]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[W, H] -> [W, Vd] float32 (float64 for float64 weights)."""
        ...
