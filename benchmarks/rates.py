"""From counts to rates with standard errors, over texts: steps of one text are not independent of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    """One text's steps, and in how many of them at least 1, 2, ... D drafted tokens were accepted."""

    steps: int
    reached: tuple[int, ...]  # [D], never rising

    @staticmethod
    def of(accepted: Sequence[int], depth: int) -> Counts:
        """From the number of drafted tokens that each step accepted."""
        return Counts(len(accepted), tuple(sum(1 for m in accepted if m >= d) for d in range(1, depth + 1)))

    @property
    def tokens(self) -> int:
        """That the steps made: each its accepted tokens and a bonus."""
        return self.steps + sum(self.reached)


@dataclass(frozen=True)
class Estimate:
    """A rate and its standard error over the texts."""

    value: float
    error: float | None  # None: of one text, nothing is known about others

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.error is None else f"{self.value:.2f} ±{self.error:.2f}"


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Estimate | None:
    """sum(parts) / sum(wholes), and its error by linearisation (Cochran, Sampling Techniques, eq. 6.13).

    Args:
        parts, wholes: one number each per text.

    Returns:
        None when there is nothing to be divided by.
    """
    a, b = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    if b.sum() == 0:
        return None
    value = a.sum() / b.sum()
    return Estimate(float(value), _error((a - value * b) / b.sum()))


def tokens_per_step(counts: Sequence[Counts]) -> Estimate | None:
    """Accepted tokens and the bonus, per step."""
    return ratio([c.tokens for c in counts], [c.steps for c in counts])


def by_depth(counts: Sequence[Counts]) -> list[Estimate]:
    """P(at least d drafted tokens are accepted), d = 1 .. D."""
    found = [ratio([c.reached[d] for c in counts], [c.steps for c in counts]) for d in range(_depth(counts))]
    return [estimate for estimate in found if estimate is not None]


def conditional(counts: Sequence[Counts]) -> list[Estimate]:
    """P(at least d are accepted, given that d - 1 were), as deep as anything was accepted, and one step further."""
    wholes = [[c.steps for c in counts], *([c.reached[d] for c in counts] for d in range(_depth(counts) - 1))]
    found = [ratio([c.reached[d] for c in counts], whole) for d, whole in enumerate(wholes)]
    return [estimate for estimate in found if estimate is not None]


def gain(ours: Sequence[Counts], reference: Sequence[Counts]) -> Estimate | None:
    """Tokens per step over the reference's, of the same texts in the same order.

    The error is that of a ratio of two ratios over paired texts, linearised.
    """
    over, under = tokens_per_step(ours), tokens_per_step(reference)
    if over is None or under is None or len(ours) != len(reference):
        return None
    pull = [
        _pull(counts, estimate.value)
        for counts, estimate in ((ours, over), (reference, under))  # relative influence of each text
    ]
    value, error = over.value / under.value, _error(pull[0] - pull[1])
    return Estimate(value, None if error is None else value * error)


def _pull(counts: Sequence[Counts], rate: float) -> np.ndarray:
    steps = np.array([c.steps for c in counts], dtype=float)
    tokens = np.array([c.tokens for c in counts], dtype=float)
    return np.asarray((tokens - rate * steps) / (rate * steps.sum()))


def _error(influence: np.ndarray) -> float | None:
    texts = len(influence)
    return math.sqrt(float((influence**2).sum()) * texts / (texts - 1)) if texts > 1 else None


def _depth(counts: Sequence[Counts]) -> int:
    return max((len(c.reached) for c in counts), default=0)
