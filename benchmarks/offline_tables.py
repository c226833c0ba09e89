"""What ``offline`` measured, judged and in tables: pure functions of the pieces of its document."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.cells import Spread
from benchmarks.checks import DEMO, Check, check_spread
from benchmarks.closed_loop import Window
from benchmarks.report import table
from benchmarks.settings import PLAIN

TREES = {8: 1.15, 16: 1.7}  # query tokens -> forward passes of one token that they may take
LINEARS = 1.15
Piece = dict[str, Any]


def offline_text(pieces: Sequence[Piece]) -> str:
    """A table for each piece, then the checks."""
    from benchmarks.speed_tables import checks_table

    parts = [f"{piece['family']}, {TABLES[piece['part']](piece)}" for piece in pieces]
    return "\n\n".join([*parts, checks_table(offline_checks(pieces))])


def offline_checks(pieces: Sequence[Piece]) -> list[Check]:
    """The bounds on trees and on plain decoding."""
    checks = []
    for piece in pieces:
        if piece["part"] == "forward":
            for size, bound in TREES.items():
                text = f"{piece['family']}, forward pass of {size} query tokens / of one"
                checks.append(check_spread(text, bound, over_one(piece, size), at_most=True))
        if piece["part"] == "limits" and piece["family"] != DEMO:
            text = f"{piece['family']}, step of plain decoding / its linears alone"
            checks.append(check_spread(text, LINEARS, over_linears(piece), at_most=True))
    return checks


def windows(piece: Piece) -> dict[str, dict[int, Window]]:
    """system -> round -> window."""
    found: dict[str, dict[int, Window]] = defaultdict(dict)
    for turn in piece["turns"]:
        found[turn["system"]][turn["round"]] = Window(**turn["window"])
    return found


def over_plain(piece: Piece, system: str) -> Spread:
    """Tokens per second over plain decoding's of the same round."""
    found = windows(piece)
    return Spread.of([window.rate / found[PLAIN][number].rate for number, window in found[system].items()])


def speeds_text(piece: Piece) -> str:
    """A line for each system, the fastest last."""
    heads = ["system", "tokens/s", "x plain", "rounds", "tokens/step", "step ms", "= forward", "+ draft", "+ rest"]
    found = windows(piece)
    names = sorted(found, key=lambda name: over_plain(piece, name).median)
    rows = [[*_speed_row(piece, name, list(found[name].values()))] for name in names]
    return f"temperature {piece['temperature']:g}, one request at a time\n{table([heads, *rows])}"


def _speed_row(piece: Piece, name: str, runs: Sequence[Window]) -> list[str]:
    spread, steps = over_plain(piece, name), sum(run.steps for run in runs)
    whole, forward, draft = (
        1e3 * sum(getattr(run, part) for run in runs) / steps
        for part in ("seconds", "forward_seconds", "draft_seconds")
    )
    return [
        name,
        f"{statistics.median(run.rate for run in runs):.1f}",
        f"{spread.median:.2f}",
        f"{spread.low:.2f}..{spread.high:.2f}",
        f"{sum(run.tokens for run in runs) / steps:.2f}",
        *(f"{value:.2f}" for value in (whole, forward, draft, whole - forward - draft)),
    ]


def over_one(piece: Piece, size: int) -> Spread | None:
    """How many times the forward pass of one token that of ``size`` takes; single passes are noisy, so the rounds are
    cut into five, and each fifth's medians compared. None where that size was not measured.
    """
    times = {int(key): value for key, value in piece["times"].items()}
    if size not in times:
        return None
    rounds = len(times[1])
    parts = min(5, rounds)
    pieces = [slice(part * rounds // parts, (part + 1) * rounds // parts) for part in range(parts)]
    return Spread.of([statistics.median(times[size][at]) / statistics.median(times[1][at]) for at in pieces])


def forward_text(piece: Piece) -> str:
    """The forward pass by query tokens."""
    rows = [["query tokens", "ms", "x one token", "rounds"]]
    for size in sorted(int(key) for key in piece["times"]):
        spread, median = over_one(piece, size), 1e3 * statistics.median(piece["times"][str(size)])
        assert spread is not None
        rows.append([str(size), f"{median:.2f}", f"{spread.median:.2f}", f"{spread.low:.2f}..{spread.high:.2f}"])
    return f"forward pass of the target, one row, context {piece['context']}\n{table(rows)}"


def over_linears(piece: Piece) -> Spread:
    """A plain step over the sum of its linears' own times, round by round."""
    return Spread.of([step / alone for step, alone in zip(piece["steps"], piece["linears"], strict=True)])


def limits_text(piece: Piece) -> str:
    """A plain step, its linears, and what reading the weights takes."""
    roof = piece["roofline"]
    step, alone = statistics.median(piece["steps"]), statistics.median(piece["linears"])
    read = roof["weight_bytes"] / roof["read_bandwidth"]
    rows = [
        ["plain decoding, one request", "ms a step", "GB/s of weights", "share of the read bandwidth"],
        *(
            [name, f"{1e3 * seconds:.2f}", f"{roof['weight_bytes'] / seconds / 1e9:.1f}", f"{read / seconds:.0%}"]
            for name, seconds in (("whole step", step), ("its linears alone", alone), ("weights read once", read))
        ),
    ]
    return f"{roof['weight_bytes'] / 1e6:.0f} MB of weights\n{table(rows)}"


TABLES: Mapping[str, Callable[[Piece], str]] = {"speeds": speeds_text, "forward": forward_text, "limits": limits_text}
