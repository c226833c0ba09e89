"""Never slower: ``auto`` against plain decoding and against fixed trees, by concurrency and temperature.

    python -m benchmarks.matrix [--family demo] [--concurrency 1 2 4 8 16 32] [--temperatures 0 1] [--resume FILE] ...

Every setting is an engine in this process, all around the same loaded target. In each cell of the matrix:

1. Warm-up, not measured: plain decoding, whose rate fixes how many tokens a run has (``--seconds`` of it); each fixed
   setting; then ``auto`` for ``--warm-up`` seconds, since a planner learns from what it serves. It keeps what it has
   learned from cell to cell, as a server does.
2. Selection: the fixed settings take turns in ``--select-runs`` rounds; the highest median is the best of the cell.
3. Paired runs: plain, the best fixed setting and ``auto`` take turns in ``--runs`` rounds. Ratios are formed within a
   round, the median over the rounds counts.

A run is a window of a closed loop (closed_loop.py). All systems of a round serve the same requests in the same order;
the order of systems is by chance, but the same in every measurement. Prompts are in every engine's prefix cache: what
is compared is decoding, and a run is short. The result is written after every cell.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.cells import Cell, Stage, Turn, best_fixed, from_json, never_slower, rates, systems, to_json
from benchmarks.closed_loop import Load, run_loop
from benchmarks.command import BenchOptions, begin_again, begun, bench_parser, carried_out, known, read
from benchmarks.family import Family, load_prompts
from benchmarks.measure import Case
from benchmarks.settings import AUTO, FIXED, PLAIN, SETTINGS, Engines, load_engines
from decoding.config import EngineConfig
from decoding.request import GenerateRequest, SamplingParams
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document

KIND = "matrix"
TREE_SLOTS = 64  # of a request, beside prompt and text
PATIENCE = 3  # a run closes after so many times its seconds, whatever has come out
LEAST_TOKENS = 16  # of a run, each row


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """The command line."""

    systems: tuple[str, ...]
    concurrency: tuple[int, ...]
    seconds: float
    warm_up: float
    select_runs: int
    runs: int
    tokens: int


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    text = "Compare auto with plain decoding and with fixed trees, by concurrency and temperature."
    parser = bench_parser("matrix", text, epilog=f"systems: {', '.join(SETTINGS)}")
    add = parser.add_argument
    add("--systems", nargs="+", default=list(SETTINGS), metavar="NAME", help="plain and auto always run")
    add("--concurrency", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N", help="requests at once")
    add("--seconds", type=float, default=1.5, help="of a run, if it decodes plainly (default: %(default)s)")
    add("--warm-up", type=float, default=3.0, metavar="SECONDS", help="of auto in each cell (default: %(default)s)")
    add("--select-runs", type=positive, default=2, metavar="N", help="rounds that choose (default: %(default)s)")
    add("--runs", type=positive, default=5, metavar="N", help="paired rounds (default: %(default)s)")
    add("--tokens", type=positive, default=128, metavar="N", help="of every request (default: %(default)s)")
    options = Options(**read(parser, argv))
    known(parser, options.systems, SETTINGS)
    if not set(options.systems) & set(FIXED):
        parser.error(f"nothing to compare with: --systems needs one of {', '.join(FIXED)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    return carried_out("bench-matrix", lambda: _report(bench(options, ["python", "-m", "benchmarks.matrix", *argv])))


def _report(document: Document) -> None:
    from benchmarks.speed_tables import matrix_text

    print(matrix_text([from_json(piece) for piece in document.pieces]))


def bench(options: Options, command: Sequence[str]) -> Document:
    """All cells; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: a family without the drafters that a system needs, a model that cannot be loaded, a document to be
            resumed that is of another kind.
    """
    from benchmarks.provenance import provenance

    family, document = begun(options, KIND)
    done = {from_json(piece).place for piece in document.pieces}
    places = [(t, c) for c in options.concurrency for t in options.temperatures if (family.name, t, c) not in done]
    if not places:
        return document
    cases = load_prompts(family.target, options.prompts, options.prompt_tokens)
    ways = {name: (name, options.drafters) for name in _names(options)}
    engines = load_engines(ways, family, base_config(options, family, cases))
    document.sessions.append(provenance(command, family.models, {"saccade": engines.dtype}))
    fill_prefix_caches(engines, cases)
    gc.collect()
    gc.freeze()  # what is loaded need not be looked through again in somebody's measured time
    for temperature, concurrency in places:
        cell = measure_cell(engines, cases, family.name, concurrency, temperature, options)
        document.pieces.append({**to_json(cell), "session": len(document.sessions) - 1})
        document.save(options.out)
        print(_line(cell), file=sys.stderr)
    return document


def _names(options: Options) -> list[str]:
    return [name for name in SETTINGS if name in (PLAIN, AUTO, *options.systems)]


def base_config(options: Options, family: Family, cases: Sequence[Case]) -> EngineConfig:
    """Room for all rows, so that none is preempted, and for all prompts and texts: finished texts are kept, too."""
    from decoding.cache import pages_for

    row = pages_for(max(len(case.ids) for case in cases) + options.tokens + TREE_SLOTS)
    kept = sum(pages_for(len(case.ids) + options.tokens) for case in cases) * len(options.temperatures)
    pages = kept + 2 * row * max(options.concurrency)
    return EngineConfig(str(family.target), dtype=options.dtype, device=options.device, num_pages=pages)


def fill_prefix_caches(engines: Engines, cases: Sequence[Case]) -> None:
    """Every engine sees every prompt once."""
    for engine in engines.by_name.values():
        for case in cases:
            engine.submit(GenerateRequest(f"prefix-{case.index}", case.ids, SamplingParams(max_tokens=1)))
        while engine.has_work:
            engine.step()


def measure_cell(
    engines: Engines, cases: Sequence[Case], family: str, concurrency: int, temperature: float, options: Options
) -> Cell:
    """Warm-up, selection, paired runs."""
    window = _warm_up(engines, cases, concurrency, temperature, options)
    load = Load(concurrency, temperature, options.tokens, window, PATIENCE * options.seconds)
    fixed = [name for name in engines.by_name if name in FIXED]
    turns = list(_rounds(engines, cases, load, "select", fixed, range(options.select_runs)))
    best = best_fixed(turns)
    paired = range(options.select_runs, options.select_runs + options.runs)  # other requests than before
    turns += _rounds(engines, cases, load, "paired", [PLAIN, best, AUTO], paired)
    return Cell(family, concurrency, temperature, best, window, tuple(turns))


def _warm_up(engines: Engines, cases: Sequence[Case], concurrency: int, temperature: float, options: Options) -> int:
    """Run everything unmeasured; returns the tokens of a run."""

    def warm(name: str, seconds: float) -> float:
        load = Load(concurrency, temperature, options.tokens, sys.maxsize, seconds, first=len(cases) // 2)
        return run_loop(engines.by_name[name], cases, load).rate

    rate = warm(PLAIN, options.seconds)
    for name in engines.by_name:
        if name != PLAIN:
            warm(name, options.warm_up if name == AUTO else options.seconds / 2)
    return max(LEAST_TOKENS * concurrency, round(rate * options.seconds))


def _rounds(
    engines: Engines, cases: Sequence[Case], load: Load, stage: Stage, names: Sequence[str], rounds: range
) -> Iterator[Turn]:
    for number in rounds:
        # by chance, but the same in every measurement: who follows whom must not matter
        key = f"{stage} {number} {load.concurrency} {load.temperature}"
        first = random.Random(key).randrange(len(cases))
        this = Load(load.concurrency, load.temperature, load.tokens, load.window, load.limit, first)
        for name in random.Random(key).sample(names, len(names)):
            gc.collect()
            yield Turn(name, stage, number, run_loop(engines.by_name[name], cases, this))


def _line(cell: Cell) -> str:
    shown = ", ".join(f"{name} {median(rates(cell, name)):.0f}" for name in systems(cell))
    spread = never_slower(cell)
    found = "" if spread is None else f"; auto / max(plain, {cell.best}) = {spread.median:.3f}"
    return f"{time.strftime('%H:%M:%S')} {cell.family} T={cell.temperature:g} x{cell.concurrency}: {shown}{found}"


if __name__ == "__main__":
    sys.exit(main())
