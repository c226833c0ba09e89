"""Top-k, top-p and min-p as a test of single candidates, so that nothing sorts a vocabulary.

The order is transformers': top-k first, top-p within what it leaves, then min-p. Tokens are ranked by logit descending,
id ascending; the best one is always kept. Sums of probabilities are float64, so that the number of nodes in a batch
(another summation order) does not decide whether a token at the edge is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filters:
    """Parameters of W nodes."""

    top_k: Tensor  # [W] int64
    top_p: Tensor  # [W] float64
    min_p: Tensor  # [W] float64
    widest: int  # host: at least the largest top_k that keeps less than the vocabulary; 0: none does

    def at(self, index: Tensor | slice) -> Filters:
        """The parameters of some of the nodes, or of nodes by their row."""
        return Filters(self.top_k[index], self.top_p[index], self.min_p[index], self.widest)

    def limiting(self, vocab: int) -> Tensor:
        """[W] bool: some filter of the node is on."""
        return (self.top_k < vocab) | (self.top_p < 1) | (self.min_p > 0)


def kept(scaled: Tensor, filters: Filters, candidates: Tensor) -> Tensor:
    """Which candidates survive.

    Args:
        scaled: [W, V] logits divided by the temperature.
        candidates: [W, C] token ids.
    Returns:
        [W, C] bool.
    """
    probs, limit = _probabilities(scaled, filters)
    best = probs.amax(dim=1)
    ids = torch.arange(scaled.shape[1], device=scaled.device)
    verdicts = []
    for candidate in candidates.unbind(1):  # C is small; [W, V, C] would not be
        candidate = candidate[:, None]
        value = scaled.gather(1, candidate)
        better = (scaled > value) | ((scaled == value) & (ids < candidate))
        rank = better.sum(dim=1)
        above = (probs * better).sum(dim=1)
        likely = probs.gather(1, candidate).squeeze(1) >= filters.min_p * best
        verdicts.append((rank == 0) | ((rank < filters.top_k) & (above < limit) & likely))
    return torch.stack(verdicts, dim=1)


def kept_everywhere(scaled: Tensor, filters: Filters) -> Tensor:
    """The same for every id, [W, V] bool, by a sort: the way out when all the likely candidates were dropped."""
    probs, limit = _probabilities(scaled, filters)
    order = scaled.argsort(dim=1, descending=True, stable=True)
    ranked = probs.gather(1, order)
    above = ranked.cumsum(dim=1) - ranked
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    keep = (rank < filters.top_k[:, None]) & (above < limit[:, None])
    keep &= ranked >= (filters.min_p * ranked[:, 0])[:, None]
    keep[:, 0] = True
    return torch.empty_like(keep).scatter_(1, order, keep)


def _probabilities(scaled: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """(softmax [W, V] float64, the mass that a token's betters must stay below for top-p to keep it [W])."""
    probs = scaled.softmax(dim=1, dtype=torch.float64)
    vocab = scaled.shape[1]
    mass = probs.sum(dim=1)
    if filters.widest:
        widest = min(filters.widest, vocab)
        # summed in order, so that a node's sum does not depend on how wide others' filters are
        sums = probs.topk(widest, dim=1).values.cumsum(dim=1)
        inside = sums.gather(1, filters.top_k.clamp(max=widest)[:, None] - 1).squeeze(1)
        mass = torch.where(filters.top_k < vocab, inside, mass)
    # off is off: in a long tail the sum of the better tokens rounds to the whole mass
    return probs, torch.where(filters.top_p < 1, filters.top_p * mass, torch.inf)
