"""A cell of the never-slower matrix: what was measured there, and the pure functions that judge it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from benchmarks.closed_loop import Window
from benchmarks.settings import AUTO, PLAIN, SETTINGS

Stage = Literal["select", "paired"]


@dataclass(frozen=True)
class Turn:
    """One window of one system. Turns of the same stage and round saw the same requests."""

    system: str
    stage: Stage  # select: the runs on which the best fixed setting is chosen; paired: those that are judged
    round: int
    window: Window


@dataclass(frozen=True)
class Cell:
    """One family at one concurrency and temperature."""

    family: str
    concurrency: int
    temperature: float
    best: str  # the fixed setting with the highest median rate in the runs for selection
    window: int  # tokens of a run
    turns: tuple[Turn, ...]
    session: int = 0

    @property
    def place(self) -> tuple[str, float, int]:
        """Where it stands in the matrix."""
        return self.family, self.temperature, self.concurrency


@dataclass(frozen=True)
class Spread:
    """A ratio: its median over the rounds, and the worst and the best round."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


def best_fixed(turns: Iterable[Turn]) -> str:
    """The fixed setting with the highest median rate; plain and auto do not stand for election.

    Raises:
        ValueError: none took a turn.
    """
    rates: dict[str, list[float]] = defaultdict(list)
    for turn in turns:
        if turn.stage == "select" and turn.system not in (PLAIN, AUTO):
            rates[turn.system].append(turn.window.rate)
    if not rates:
        raise ValueError("no fixed setting took a turn")
    return max(rates, key=lambda name: statistics.median(rates[name]))


def rates(cell: Cell, system: str) -> list[float]:
    """Tokens per second of a system, run by run: the paired runs, or those for selection if it has no others."""
    for stage in ("paired", "select"):
        found = [t.window.rate for t in cell.turns if t.system == system and t.stage == stage]
        if found:
            return found
    return []


def systems(cell: Cell) -> list[str]:
    """Those that ran, in the order of the report."""
    ran = {turn.system for turn in cell.turns}
    return [name for name in SETTINGS if name in ran]


def ratio(cell: Cell, system: str, references: Sequence[str]) -> Spread | None:
    """system / max(references), each round for itself; None when they have no paired round in common."""
    by_round: dict[int, dict[str, float]] = defaultdict(dict)
    for turn in cell.turns:
        if turn.stage == "paired":
            by_round[turn.round][turn.system] = turn.window.rate
    found = [
        rate[system] / max(rate[name] for name in references)
        for rate in by_round.values()
        if {system, *references} <= set(rate)
    ]
    return Spread.of(found) if found else None


def never_slower(cell: Cell) -> Spread | None:
    """auto / max(plain, best fixed), within a round.

    The larger of two noisy rates is more often the luckier one, so where the two are equal this is a little below 1
    even for a system that equals both.
    """
    return ratio(cell, AUTO, (PLAIN, cell.best))


def tokens_per_step(cell: Cell, system: str) -> float | None:
    """Of one row: tokens / (steps * concurrency), over the paired runs, or those for selection."""
    windows = [t.window for t in cell.turns if t.system == system]
    steps = sum(w.steps for w in windows)
    return sum(w.tokens for w in windows) / (steps * cell.concurrency) if steps else None


def geometric_mean(cells: Iterable[Cell]) -> float | None:
    """Of the cells' ratios; None without any."""
    found = [spread.median for cell in cells if (spread := never_slower(cell)) is not None]
    return statistics.geometric_mean(found) if found else None


def to_json(cell: Cell) -> dict[str, Any]:
    """As a document's piece."""
    return asdict(cell)


def from_json(piece: dict[str, Any]) -> Cell:
    """The inverse of ``to_json``."""
    turns = tuple(Turn(**{**turn, "window": Window(**turn["window"])}) for turn in piece["turns"])
    return Cell(**{field.name: piece[field.name] for field in fields(Cell)} | {"turns": turns})
