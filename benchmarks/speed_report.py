"""docs/benchmarks.md, made of results.

    python -m benchmarks.speed_report benchmarks/results/*.json --out docs/benchmarks.md

Results of several commands and sessions are put together; what is not among them is named as not measured. A ``.txt``
file among the results, what another benchmark printed, goes onto the page as it is, under its name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, documents, gpu, matrix, offline, speed_plots
from benchmarks.cells import Cell, from_json
from benchmarks.checks import Check, matrix_checks
from benchmarks.command import carried_out
from benchmarks.documents import Document
from benchmarks.gpu_tables import gpu_checks, gpu_tables
from benchmarks.offline_tables import TABLES, offline_checks
from benchmarks.pages import indented, sources
from benchmarks.peer_tables import compare_checks, compare_table
from benchmarks.roofline import Roofline
from benchmarks.speed_tables import checks_table, matrix_tables
from server.flags import Parser

IMAGES = "images"  # beside the page
TEXT = ".txt"
INTRODUCTION = """\
# Measured

This page is written by `python -m benchmarks.speed_report` from the results of `make bench-matrix`, `make
bench-offline`, `make bench-compare` and `make bench-gpu`; each table's command, commit, machine and models stand [at
the end](#where-the-numbers-come-from). Trust ratios more than rates: they are formed within a round, in which the
systems that are compared take turns, and are medians over the rounds; `rounds` is from the worst to the best of them.
"""
MATRIX = """\
## Never slower

A closed loop: so many requests are always in flight, each replaced as soon as it ends. Timed is a window of a fixed
number of tokens, the same requests for every system. Prompts are in every engine's prefix cache. `plain` does not
speculate; `ngram-8`, `draft-chain-4` and `tree-24` do the same in every step, as servers are set up by hand; `auto`
leaves drafters and nodes to the planner. The best fixed setting is chosen on runs of its own, and then takes turns
with `plain` and `auto`. In brackets: tokens a step and row. [benchmarks/matrix.py](../benchmarks/matrix.py) says it
in full.
"""
OFFLINE = """\
## One request at a time

`auto:NAME` is the planner with one drafter. A step's time is divided into the target's forward pass, the drafters,
and the rest: planning, sampling, verifying, Python.
"""
COMPARE = """\
## Others on the same weights

Same prompts, same machine, in turns; times include the prompt. transformers (`hf`) in the same process, llama.cpp's
server (`llama`) over the loopback, where it was measured. Below each table: the setting of each that was tried and
found best, if it was tuned.
"""
NO_GPU = """\
## On a GPU

Not measured: no CUDA device was at hand. `make bench-gpu` measures it in under 8 minutes on a machine that has one.
"""
NOT_MEASURED = {
    matrix.KIND: "The never-slower matrix was not measured (`make bench-matrix`).",
    offline.KIND: "Single requests were not measured (`make bench-offline`).",
    compare.KIND: "Other engines were not measured (`make bench-compare`).",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write page and images; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.speed_report", description="Write docs/benchmarks.md from results.")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what the benchmarks wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="(default: %(default)s)")
    args, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        parser.refuse(extra)
    return carried_out("speed-report", lambda: write(args.results, args.out))


def write(results: Sequence[Path], out: Path) -> None:
    """The page and its images.

    Raises:
        ConfigError: a file that holds no result.
    """
    merged = documents.merge([documents.load(path) for path in results if path.suffix != TEXT])
    printed = {path.stem: path.read_text(encoding="utf-8") for path in results if path.suffix == TEXT}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(merged, out.parent / IMAGES, printed), encoding="utf-8")


def page(merged: Mapping[str, Document], images: Path, printed: Mapping[str, str]) -> str:
    """The whole page; its images are drawn on the way.

    Args:
        printed: a name -> what another benchmark printed.
    """
    pieces = {kind: merged[kind].pieces if kind in merged else [] for kind in NOT_MEASURED}
    cells = [from_json(piece) for piece in pieces[matrix.KIND]]
    checks = matrix_checks(cells) + offline_checks(pieces[offline.KIND]) + compare_checks(pieces[compare.KIND])
    checks += gpu_checks(merged[gpu.KIND].pieces) if gpu.KIND in merged else []
    parts = [
        INTRODUCTION,
        *(text for kind, text in NOT_MEASURED.items() if not pieces[kind]),
        _requirements(checks),
        *(_matrix(cells, pieces[offline.KIND], images) if cells else []),
        *(_offline(pieces[offline.KIND], images) if pieces[offline.KIND] else []),
        *(_compare(pieces[compare.KIND], images) if pieces[compare.KIND] else []),
        *_gpu(merged.get(gpu.KIND)),
        *(f"## {name.replace('-', ' ').capitalize()}\n\n{indented(text)}" for name, text in printed.items()),
        _sources(merged),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _requirements(checks: Sequence[Check]) -> str:
    return f"## What is required\n\n{indented(checks_table(checks))}" if checks else ""


def _matrix(cells: Sequence[Cell], single: Sequence[dict[str, Any]], images: Path) -> list[str]:
    roofs = {
        piece["family"]: (Roofline(**piece["roofline"]), piece["context"])
        for piece in single
        if piece["part"] == "limits"
    }
    files = speed_plots.draw_matrix(images, cells, roofs)
    return [MATRIX, *(picture(path) for path in files), indented(matrix_tables(cells))]


def _offline(pieces: Sequence[dict[str, Any]], images: Path) -> list[str]:
    forward = [piece for piece in pieces if piece["part"] == "forward"]
    drawn = [picture(speed_plots.draw_forward(images, forward))] if forward else []
    tables = [f"{piece['family']}, {TABLES[piece['part']](piece)}" for piece in pieces]
    return [OFFLINE, *drawn, *(indented(text) for text in tables)]


def _compare(pieces: Sequence[dict[str, Any]], images: Path) -> list[str]:
    drawn = picture(speed_plots.draw_peers(images, pieces))
    return [COMPARE, drawn, *(indented(compare_table(piece)) for piece in pieces)]


def _gpu(document: Document | None) -> list[str]:
    if document is None:
        return [NO_GPU]
    devices = ", ".join(session["device"] for session in document.sessions)
    return [f"## On a GPU\n\n{devices}.", indented(gpu_tables(document.pieces))]


def _sources(merged: Mapping[str, Document]) -> str:
    return "\n\n".join(["## Where the numbers come from", *sources(merged.values())])


def picture(path: Path) -> str:
    return f"![{path.stem.replace('-', ' ')}]({IMAGES}/{path.name})"


if __name__ == "__main__":
    sys.exit(main())
