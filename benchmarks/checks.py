"""What the speed of Saccade must be, and whether it is: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cells import Cell, Spread, geometric_mean, never_slower, ratio
from benchmarks.settings import AUTO, PLAIN

DEMO = "demo"  # the family that is 8M parameters small, and bound by overhead
MEAN_RATIO = 0.97
WORST_RATIO = 0.93
GREEDY_GAIN = 1.5
SAMPLED_GAIN = 1.2


@dataclass(frozen=True)
class Check:
    """A bound, and what was measured; ``measured`` is None where a part did not run."""

    text: str
    bound: float
    measured: float | None
    low: float | None = None  # in the worst round,
    high: float | None = None  # and in the best
    at_most: bool = False  # the bound is an upper one

    @property
    def passed(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def check_spread(text: str, bound: float, spread: Spread | None, *, at_most: bool = False) -> Check:
    """A check of a ratio over rounds."""
    if spread is None:
        return Check(text, bound, None, at_most=at_most)
    return Check(text, bound, spread.median, spread.low, spread.high, at_most)


def matrix_checks(cells: Sequence[Cell]) -> list[Check]:
    """Never slower, over all cells of all families; and what speculation must bring a single request."""
    if not cells:
        return []
    return never_slower_checks(cells) + [check for cell in cells for check in _gain(cell)]


def never_slower_checks(cells: Sequence[Cell], prefix: str = "") -> list[Check]:
    """auto against the better one of plain and the best fixed setting."""
    ratios = [(spread.median, cell) for cell in cells if (spread := never_slower(cell)) is not None]
    mean = f"{prefix}auto / max(plain, best fixed), geometric mean of {len(ratios)} cells"
    if not ratios:
        return [Check(mean, MEAN_RATIO, None)]
    _, worst = min(ratios, key=lambda pair: pair[0])
    where = f"{worst.family}, T={worst.temperature:g}, concurrency {worst.concurrency}"
    return [
        Check(mean, MEAN_RATIO, geometric_mean(cells)),
        check_spread(f"{prefix}the same, worst cell ({where})", WORST_RATIO, never_slower(worst)),
    ]


def _gain(cell: Cell) -> list[Check]:
    if cell.concurrency != 1 or cell.temperature not in (0.0, 1.0) or (cell.temperature and cell.family == DEMO):
        return []
    bound = SAMPLED_GAIN if cell.temperature else GREEDY_GAIN
    text = f"{cell.family}, T={cell.temperature:g}, one request: auto / plain"
    return [check_spread(text, bound, ratio(cell, AUTO, (PLAIN,)))]
