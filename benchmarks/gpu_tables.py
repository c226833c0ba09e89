"""What ``gpu`` measured, judged and in tables: pure functions of the pieces of its document."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cells import Cell, Spread, from_json, ratio
from benchmarks.checks import Check, check_spread, never_slower_checks
from benchmarks.offline_tables import forward_text, over_one
from benchmarks.peer_tables import HF, compare_table, over, runs_of
from benchmarks.report import table
from benchmarks.settings import AUTO, PLAIN
from benchmarks.speed_tables import checks_table, matrix_tables

BANDWIDTH_SHARE = 0.8
TREE, TREE_COST = 32, 1.15
GAINS = {0.0: 3.0, 1.0: 2.5}  # temperature -> auto / plain, one request
OVER_TRANSFORMERS = 1.0  # to be beaten; the issue names no factor on CUDA
Piece = dict[str, Any]


def gpu_text(pieces: Sequence[Piece]) -> str:
    """The tables, then the checks."""
    return f"{gpu_tables(pieces)}\n\n{checks_table(gpu_checks(pieces))}"


def gpu_tables(pieces: Sequence[Piece]) -> str:
    """Forward pass, bandwidth, matrix and transformers, as far as they were measured."""
    tables = {"forward": forward_text, "limits": limits_text, "peer": compare_table}
    parts = [tables[piece["part"]](piece) for piece in pieces if piece["part"] in tables]
    cells = cells_of(pieces)
    return "\n\n".join([*parts, *([matrix_tables(cells)] if cells else [])])


def cells_of(pieces: Sequence[Piece]) -> list[Cell]:
    """The cells of the matrix."""
    return [from_json(piece) for piece in pieces if piece["part"] == "cell"]


def limits_text(piece: Piece) -> str:
    """A plain step against the bandwidth of a copy."""
    roof, share = piece["roofline"], bandwidth_share(piece)
    step = statistics.median(piece["steps"])
    rows = [
        ["weights", "copy bandwidth", "bound, tokens/s", "plain, tokens/s", "share"],
        [
            f"{roof['weight_bytes'] / 1e9:.2f} GB",
            f"{roof['read_bandwidth'] / 1e9:.0f} GB/s",
            f"{roof['read_bandwidth'] / roof['weight_bytes']:.1f}",
            f"{1 / step:.1f}",
            f"{share.median:.0%}",
        ],
    ]
    return f"plain decoding at batch 1\n{table(rows)}"


def bandwidth_share(piece: Piece) -> Spread:
    """Of the bandwidth bound (weight bytes / copy bandwidth) that plain decoding at batch 1 reaches, run by run."""
    bound = piece["roofline"]["weight_bytes"] / piece["roofline"]["read_bandwidth"]
    return Spread.of([bound / step for step in piece["steps"]])


def gpu_checks(pieces: Sequence[Piece]) -> list[Check]:
    """What the device must show; a phase that did not run is not measured."""
    by_part = {piece["part"]: piece for piece in pieces}
    limits, forward, peer = (by_part.get(part) for part in ("limits", "forward", "peer"))
    share = bandwidth_share(limits) if limits else None
    cost = over_one(forward, TREE) if forward else None
    cells = cells_of(pieces)
    return [
        check_spread("GPU, plain decoding at batch 1 / bandwidth bound", BANDWIDTH_SHARE, share),
        check_spread(f"GPU, forward pass of {TREE} query tokens / of one", TREE_COST, cost, at_most=True),
        *(_gain(cells, temperature, bound) for temperature, bound in GAINS.items()),
        *never_slower_checks(cells, "GPU, "),
        _over_transformers(peer),
    ]


def _gain(cells: Sequence[Cell], temperature: float, bound: float) -> Check:
    found = [cell for cell in cells if (cell.concurrency, cell.temperature) == (1, temperature)]
    spread = ratio(found[0], AUTO, (PLAIN,)) if found else None
    return check_spread(f"GPU, T={temperature:g}, one request: auto / plain", bound, spread)


def _over_transformers(piece: Piece | None) -> Check:
    runs = {} if piece is None else runs_of(piece)
    spread = over(runs.get(PLAIN, []), runs.get(HF, []))
    return check_spread("GPU, plain decoding / transformers' best", OVER_TRANSFORMERS, spread)
