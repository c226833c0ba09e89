"""How much a drafter's confidence is worth, learned from its proposals and the text that came (design section 2).

Text never depends on drafts, so every proposal, verified or not, gets an unbiased label: each candidate whose parent
is on the text was right or not. Per drafter, mode and depth these make a rising curve from confidence to acceptance,
and a tau: the temperature of the drafter's softmax under which its candidates come true as often as it says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.proposal_ops import FIRST_KNOT, KNOTS, ProposalOps, Tally
from decoding.sequence import Sequence
from models.transfer import upload
from models.tree import Trees

MODES = ("greedy", "coupled", "uncoupled", "lossy")  # what acceptance means differs; see ``mode_of``
DEPTHS = 8  # deeper nodes share the last curve
PRIOR = 8.0  # trials that the prior curve counts for, at each knot
MEMORY = 600.0  # trials at a knot beyond which old ones fade
REFRESH = 32  # proposals between two looks at the curves
TAU_RATE = 0.25  # of a mean surprise of one nat, on the logarithm of tau
TAU_RANGE = (0.2, 3.0)


def mode_of(sequence: Sequence) -> int:
    """Which of ``MODES`` holds for a row's drafts."""
    if sequence.is_greedy:
        return 0
    if sequence.acceptance.rule != "exact":
        return 3
    return 1 if sequence.is_coupled else 2


@dataclass
class _Learned:
    """One drafter's."""

    tally: Tally
    curves: Tensor  # [M, D, B] float64
    log_tau: np.ndarray  # [M, D]
    proposals: int = 0


class Calibration:
    """The curves and taus of an engine's drafters.

    Args:
        drafters: how many; they are known by their bits.
    """

    def __init__(self, drafters: int, ops: ProposalOps) -> None:
        self.ops = ops
        odds = torch.arange(KNOTS, dtype=torch.float64) + FIRST_KNOT
        self._prior = odds.sigmoid()
        size = (len(MODES), DEPTHS, KNOTS)
        self._learned = [
            _Learned(
                Tally(
                    torch.zeros(size, dtype=torch.float64),
                    torch.zeros(size, dtype=torch.float64),
                    torch.zeros(len(MODES), DEPTHS, 2, dtype=torch.float64),
                ),
                self._prior.expand(size).contiguous(),
                np.zeros((len(MODES), DEPTHS)),
            )
            for _ in range(drafters)
        ]

    def apply(self, bit: int, trees: Trees, mode: Tensor) -> Trees:
        """The proposals of a drafter with calibrated confidences; ``mode`` [R]."""
        curves, device = self._learned[bit].curves, trees.tokens.device
        if device.type != "cpu":
            curves, mode = upload(device, curves.numpy(), mode.numpy())
        confidence = self.ops.recalibrate(trees, mode, curves)
        return Trees(trees.tokens, trees.parents, confidence, trees.source)

    def taus(self, bit: int, mode: int) -> tuple[float, ...]:
        """Factors on the drafter's own tau, by depth."""
        return tuple(np.exp(self._learned[bit].log_tau[mode]).tolist())

    def tally(self, bit: int) -> Tally:
        """What is counted of a drafter; whoever adds to it says so by ``saw``."""
        return self._learned[bit].tally

    def saw(self, bit: int, proposals: int) -> None:
        """So many proposals have been added to the tally."""
        learned = self._learned[bit]
        learned.proposals += proposals
        if learned.proposals >= REFRESH:
            learned.proposals = 0
            self._refresh(learned)

    def _refresh(self, learned: _Learned) -> None:
        tally = learned.tally
        faded = (MEMORY / tally.trials.clamp(min=MEMORY)).clamp(max=1.0)
        tally.hits.mul_(faded)
        tally.trials.mul_(faded)
        # depths borrow from each other: where little was seen, the curve of all depths of the mode stands in
        shared_hits, shared_trials = tally.hits.sum(1, keepdim=True), tally.trials.sum(1, keepdim=True)
        shared = (shared_hits + PRIOR * self._prior) / (shared_trials + PRIOR)
        rates = (tally.hits + PRIOR * shared) / (tally.trials + PRIOR)
        curves = rising(rates.numpy(), (tally.trials + PRIOR).numpy())
        learned.curves.copy_(torch.from_numpy(curves))
        count = tally.surprise[..., 1].numpy()
        mean = tally.surprise[..., 0].numpy() / np.maximum(count, 1)
        moved = learned.log_tau - TAU_RATE * mean * np.minimum(count / REFRESH, 1)
        learned.log_tau = np.clip(moved, np.log(TAU_RANGE[0]), np.log(TAU_RANGE[1]))
        tally.surprise.zero_()


def rising(rates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest curves that never fall along the last dim (isotonic regression by pooling adjacent violators)."""
    flat_rates, flat_weights = rates.reshape(-1, rates.shape[-1]), weights.reshape(-1, rates.shape[-1])
    out = np.empty_like(flat_rates)
    for index, (rate, weight) in enumerate(zip(flat_rates, flat_weights, strict=True)):
        if (np.diff(rate) >= 0).all():
            out[index] = rate
            continue
        pools: list[tuple[float, float, int]] = []  # mean, weight, knots
        for value, mass in zip(rate.tolist(), weight.tolist(), strict=True):
            pool = (value, mass, 1)
            while pools and pools[-1][0] > pool[0]:
                mean, heavy, count = pools.pop()
                total = heavy + pool[1]
                pool = ((mean * heavy + pool[0] * pool[1]) / total, total, count + pool[2])
            pools.append(pool)
        out[index] = np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])
    return out.reshape(rates.shape)
