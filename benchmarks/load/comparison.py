"""Two servers side by side: ratios with confidence intervals, from round to round.

Requests of a round share the machine's mood and their server's queue, so they are no independent samples; rounds nearly
are. In each round both servers did the same, one after the other: the ratio is taken within the round, and the interval
is Student's over the logarithms of the rounds' ratios. Its width is what the noise of this very run allows to be said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.load.loops import Turn
from benchmarks.load.records import Record
from benchmarks.load.summary import times_of, tokens_in

LEAST_ROUNDS = 3
# 97.5% quantiles of Student's t for 1, 2, ... 30 degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2)
_FEW = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
_MORE = (2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
_T = _FEW + _MORE


@dataclass(frozen=True)
class Ratio:
    """B's figure over A's.

    Attributes:
        low, high: ends of the 95% confidence interval; None: of too few rounds nothing is known.
        rounds: that have both figures.
    """

    metric: str
    load: str
    value: float
    low: float | None
    high: float | None
    rounds: int
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """ "faster" or "slower", of B, when the interval leaves 1 out; "no difference shown" else."""
        if self.low is None or self.high is None:
            return "too few rounds to tell"
        if self.low <= 1.0 <= self.high:
            return "no difference shown"
        return "faster" if (self.value > 1.0) == self.higher_is_better else "slower"

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class Texts:
    """Answers of both servers to the same prompts: how many pairs, how many of them have the same text."""

    pairs: int
    same: int


def compare(a: Sequence[Turn], b: Sequence[Turn]) -> list[Ratio]:
    """The ratios of two servers' turns under one load; figures that a server does not have are left out."""
    pairs = list(zip(_by_round(a), _by_round(b), strict=True))
    found = []
    for metric, (figure, higher_is_better) in FIGURES.items():
        both = [(figure(one), figure(other)) for one, other in pairs]
        logs = [math.log(other / one) for one, other in both if one and other]
        if logs:
            value, low, high = interval(logs)
            found.append(Ratio(metric, a[0].load.label, value, low, high, len(logs), higher_is_better))
    return found


def interval(logs: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(geometric mean, ends of its 95% confidence interval) of ratios, given their logarithms."""
    mean, rounds = float(np.mean(logs)), len(logs)
    if rounds < LEAST_ROUNDS:
        return math.exp(mean), None, None
    half = _T[min(rounds - 1, len(_T)) - 1] * float(np.std(logs, ddof=1)) / math.sqrt(rounds)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def compare_texts(a: Sequence[Turn], b: Sequence[Turn]) -> Texts:
    """Of the prompts that both answered."""
    ours, theirs = _digests(a), _digests(b)
    common = ours.keys() & theirs.keys()
    return Texts(len(common), sum(1 for prompt in common if ours[prompt] == theirs[prompt]))


def _digests(turns: Sequence[Turn]) -> dict[int, str]:
    return {record.prompt: record.digest for turn in turns for record in _succeeded(turn)}


def _by_round(turns: Sequence[Turn]) -> list[Turn]:
    return sorted(turns, key=lambda turn: turn.round)


def _succeeded(turn: Turn) -> list[Record]:
    return [record for record in turn.records if record.error is None]


def _median(name: str) -> Callable[[Turn], float | None]:
    def figure(turn: Turn) -> float | None:
        times = times_of(name, _succeeded(turn))
        return float(np.median(times)) if times else None

    return figure


def _mean(name: str) -> Callable[[Turn], float | None]:
    def figure(turn: Turn) -> float | None:
        times = times_of(name, _succeeded(turn))
        return float(np.mean(times)) if times else None

    return figure


def _rate(turn: Turn) -> float | None:
    return tokens_in(turn) / turn.seconds if turn.seconds > 0 else None


BETWEEN_CHUNKS = "ITL (mean)"

# what is compared -> (a turn's figure, whether more of it is better). Pauses between chunks by their mean: where a step
# brings several tokens at once, most pauses are short and few are long, and a median says little.
FIGURES: dict[str, tuple[Callable[[Turn], float | None], bool]] = {
    "output tokens/s": (_rate, True),
    "TTFT (median)": (_median("ttft"), False),
    "TPOT (median)": (_median("tpot"), False),
    BETWEEN_CHUNKS: (_mean("itl"), False),
    "end to end (median)": (_median("e2el"), False),
}
