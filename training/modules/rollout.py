"""Training-time test (EAGLE-3, arXiv 2503.01840 section 3.2): drafting as served, for every position of a window.

Entry e of a window pairs the target's feature of token e with token e + 1, at RoPE position e: slot e + 1 of
``models/heads/feature_model.py``. The first pass runs over all entries. Pass i then drafts one node further from every
*anchor*, an entry at which drafting starts: it reads the true token e + 1 + i at position e + i and what the previous
pass gave at this anchor, and attends to the committed entries up to the anchor and to its own ancestors. That is
exactly what a drafter computes for a right guess, so the model is trained on its own features and not on the
target's only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Past(NamedTuple):
    """K/V of one layer: of the committed entries, and of the nodes drafted so far from each anchor."""

    keys: Tensor  # [B, E, Hkv, D]
    values: Tensor
    drafted_keys: Tensor | None = None  # [B, A, depth, Hkv, D]
    drafted_values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> Past:
        """With one more node at every anchor, keys and values [B, A, Hkv, D]."""
        keys, values = keys.unsqueeze(2), values.unsqueeze(2)
        if self.drafted_keys is not None and self.drafted_values is not None:
            keys = torch.cat([self.drafted_keys, keys], dim=2)
            values = torch.cat([self.drafted_values, values], dim=2)
        return self._replace(drafted_keys=keys, drafted_values=values)

    def kept(self, anchors: Tensor) -> Past:
        """With the drafted nodes of some anchors only, given by their places."""
        if self.drafted_keys is None or self.drafted_values is None:
            return self
        keys, values = self.drafted_keys.index_select(1, anchors), self.drafted_values.index_select(1, anchors)
        return self._replace(drafted_keys=keys, drafted_values=values)


class RolloutModule(Protocol):
    """A drafter that continues from the target's features, in training."""

    def enter(self, features: Tensor) -> Tensor:
        """The target's features [B, E, F] -> what a pass takes in their place [B, E, C]."""
        ...

    def run(
        self,
        embedded: Tensor,  # [B, A, H] embeddings of the tokens
        carry: Tensor,  # [B, A, C]
        positions: Tensor,  # [A] RoPE positions
        past: Sequence[Past] | None,  # of each layer; None in the pass over committed entries
        anchors: Tensor | None,  # [A] entries
    ) -> tuple[Tensor, Tensor, list[Past]]:
        """Returns hidden [B, A, H], which the LM head takes; the carry of the next pass; K/V with this pass's."""
        ...


@dataclass(frozen=True)
class Pass:
    """One step of the unrolled drafting."""

    anchors: Tensor  # [A] int64 entries, ascending
    hidden: Tensor  # [B, A, H]
    carry: Tensor  # [B, A, C]


def unroll(
    module: RolloutModule,
    features: Tensor,  # [B, E, F]
    embedded: Tensor,  # [B, E, H] entry e: the embedding of token e + 1
    steps: int,
    keep: float = 1.0,
    generator: torch.Generator | None = None,
    checkpointing: bool = False,
) -> list[Pass]:
    """All passes; pass i has the anchors up to E - 1 - i.

    Args:
        keep: share of the anchors that each pass after the first takes over from the one before; which ones is drawn
            by ``generator`` (of the CPU).
        checkpointing: keep the passes' inputs only, and run them again in the backward pass.
    """
    anchors = torch.arange(embedded.shape[1], device=embedded.device)
    carry = module.enter(features)
    past: list[Past] | None = None
    passes: list[Pass] = []
    for step in range(steps):
        if step:
            places = _continued(anchors, embedded.shape[1] - step, keep, generator)
            anchors, carry = anchors[places], carry.index_select(1, places)
            past = [layer.kept(places) for layer in past or ()]
        inputs = (embedded.index_select(1, anchors + step), carry, anchors + step, past, anchors if step else None)
        if checkpointing and torch.is_grad_enabled():
            hidden, carry, past = checkpoint(module.run, *inputs, use_reentrant=False)
        else:
            hidden, carry, past = module.run(*inputs)
        passes.append(Pass(anchors, hidden, carry))
    return passes


def _continued(anchors: Tensor, end: int, keep: float, generator: torch.Generator | None) -> Tensor:
    """Places in ``anchors`` of those that go one node further: a random share of those below ``end``, ascending."""
    valid = int(torch.searchsorted(anchors, end))
    if keep >= 1:
        return torch.arange(valid, device=anchors.device)
    count = max(1, round(keep * valid))
    return torch.randperm(valid, generator=generator)[:count].sort().values.to(anchors.device)


def attend_committed(query: Tensor, past: Past, scale: float) -> Tensor:
    """Causal attention among the entries; query [B, E, Hq, D] -> [B, E, Hq, D]."""
    query, keys, values = (x.transpose(1, 2) for x in (query, past.keys, past.values))
    attended = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


def attend_drafted(query: Tensor, past: Past, anchors: Tensor, scale: float) -> Tensor:
    """Attention of the last drafted node of each anchor to the entries up to the anchor and to its own ancestors.

    Only diagonals of the further passes' keys are seen, so their scores are single products per anchor and the
    unrolled window costs one matrix of scores a pass. query [B, A, Hq, D] -> [B, A, Hq, D].
    """
    keys, values, drafted_keys, drafted_values = past
    assert drafted_keys is not None
    assert drafted_values is not None
    entries, kv_heads = keys.shape[1:3]
    grouped = query.view(*query.shape[:2], kv_heads, -1, query.shape[3])  # [B, A, Hkv, G, D]
    committed = torch.einsum("bahgd,behd->bhgae", grouped, keys).to(torch.promote_types(query.dtype, torch.float32))
    unseen = torch.arange(entries, device=anchors.device) > anchors[:, None]  # [A, E]
    drafted = torch.einsum("bahgd,bajhd->bhgaj", grouped, drafted_keys).to(committed.dtype)
    scores = torch.cat([committed.masked_fill(unseen, -torch.inf), drafted], dim=-1) * scale
    probs = scores.softmax(dim=-1).to(values.dtype)
    attended = torch.einsum("bhgae,behd->bahgd", probs[..., :entries], values)
    attended = attended + torch.einsum("bhgaj,bajhd->bahgd", probs[..., entries:], drafted_values)
    return attended.flatten(2, 3)
