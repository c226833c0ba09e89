"""Tables of the speed benchmarks, in text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.cells import Cell, Spread, never_slower, rates, ratio, systems, tokens_per_step
from benchmarks.checks import Check, matrix_checks
from benchmarks.report import table
from benchmarks.settings import AUTO, PLAIN, SETTINGS

VERDICTS = {True: "pass", False: "MISS", None: "not measured"}


def matrix_text(cells: Sequence[Cell]) -> str:
    """The tables, then the checks."""
    return f"{matrix_tables(cells)}\n\n{checks_table(matrix_checks(cells))}"


def matrix_tables(cells: Sequence[Cell]) -> str:
    """A table per family and temperature."""
    parts = []
    for family, temperature in sorted({(cell.family, cell.temperature) for cell in cells}):
        mine = [cell for cell in cells if (cell.family, cell.temperature) == (family, temperature)]
        mine.sort(key=lambda cell: cell.concurrency)
        parts.append(f"{family}, temperature {temperature:g}, tokens/s (tokens a step and row)\n{_matrix(mine)}")
    return "\n\n".join(parts)


def _matrix(cells: Sequence[Cell]) -> str:
    names = [name for name in SETTINGS if any(name in systems(cell) for cell in cells)]
    heads = ["requests", *names, "best fixed", "auto/plain", "auto/best", "auto/max", "rounds"]
    return table([heads, *(_cell_row(cell, names) for cell in cells)])


def _cell_row(cell: Cell, names: Sequence[str]) -> list[str]:
    spreads = (ratio(cell, AUTO, (PLAIN,)), ratio(cell, AUTO, (cell.best,)), never_slower(cell))
    return [
        str(cell.concurrency),
        *(_rate(cell, name) for name in names),
        cell.best,
        *(_median(spread) for spread in spreads),
        _range(spreads[-1]),
    ]


def _rate(cell: Cell, name: str) -> str:
    found, per_step = rates(cell, name), tokens_per_step(cell, name)
    return f"{statistics.median(found):.0f} ({per_step:.2f})" if found and per_step is not None else "-"


def checks_table(checks: Sequence[Check]) -> str:
    """One line a check."""
    heads = ["requirement", "bound", "measured", "rounds", ""]
    return table([heads, *(_check_row(check) for check in checks)])


def _check_row(check: Check) -> list[str]:
    bound = f"{'<=' if check.at_most else '>='} {check.bound:.2f}"
    measured = "-" if check.measured is None else f"{check.measured:.3f}"
    spread = "" if check.low is None or check.high is None else f"{check.low:.2f}..{check.high:.2f}"
    return [check.text, bound, measured, spread, VERDICTS[check.passed]]


def _median(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.3f}"


def _range(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.low:.2f}..{spread.high:.2f}"
