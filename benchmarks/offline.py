"""One request at a time, and what its step is made of.

    python -m benchmarks.offline [--family demo] [--temperatures 0 1] [--parts speeds forward limits] ...

Parts, each of them a piece of the result, written as soon as it is measured:

- ``speeds``: tokens per second, tokens per step, and the time of a step in forward pass, drafting and the rest: plain,
  the fixed settings, ``auto`` with all drafters, and with each of them alone. Systems take turns, as in matrix.py.
- ``forward``: the target's forward pass over trees of 1 to 64 random tokens (forward_cost.py).
- ``limits``: a step of plain decoding against the same linears called alone, one after the other, and against the time
  that reading the weights takes at the machine's read bandwidth (linear_times.py).
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.closed_loop import Load, Window, run_loop
from benchmarks.command import BenchOptions, begin_again, begun, bench_parser, carried_out, read
from benchmarks.family import Family, load_prompts
from benchmarks.measure import Case
from benchmarks.settings import AUTO, FIXED, PLAIN, Engines, load_engines
from decoding.config import EngineConfig
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document

KIND = "offline"
PARTS = ("speeds", "forward", "limits")
PATIENCE = 3
LEAST_TOKENS = 32
LINEAR_TURNS = 5  # of the linears alone, after each run of plain steps


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """The command line."""

    parts: tuple[str, ...]
    seconds: float
    warm_up: float
    runs: int
    tokens: int


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = bench_parser("offline", "Measure one request at a time, and what its step is made of.")
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="(default: all)")
    add("--seconds", type=float, default=1.5, help="of a run, if it decodes plainly (default: %(default)s)")
    add("--warm-up", type=float, default=2.0, metavar="SECONDS", help="of each system (default: %(default)s)")
    add("--runs", type=positive, default=5, metavar="N", help="rounds (default: %(default)s)")
    add("--tokens", type=positive, default=96, metavar="N", help="of every request (default: %(default)s)")
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    return carried_out("bench-offline", lambda: _report(bench(options, ["python", "-m", "benchmarks.offline", *argv])))


def _report(document: Document) -> None:
    from benchmarks.offline_tables import offline_text

    print(offline_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """All parts; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: a model that cannot be loaded, a document to be resumed that is of another kind.
    """
    from benchmarks.provenance import provenance

    family, document = begun(options, KIND)
    done = {(piece["family"], piece["part"], piece.get("temperature")) for piece in document.pieces}
    cases = load_prompts(family.target, options.prompts, options.prompt_tokens)
    base = EngineConfig(
        str(family.target), dtype=options.dtype, device=options.device, num_pages=_pages(cases, options)
    )
    engines = _engines(family, base, options)
    document.sessions.append(provenance(command, family.models, {"saccade": engines.dtype}))
    gc.collect()
    gc.freeze()
    for piece in _pieces(family, engines, cases, options, done):
        named = {"family": family.name, "session": len(document.sessions) - 1, **piece}
        document.pieces.append(named)
        document.save(options.out)
        print(f"{family.name}: {piece['part']} done", file=sys.stderr)
    return document


def _pages(cases: Sequence[Case], options: Options) -> int:
    from decoding.cache import pages_for

    whole = sum(pages_for(len(case.ids) + options.tokens) for case in cases) * len(options.temperatures)
    return whole + 2 * pages_for(max(len(case.ids) for case in cases) + options.tokens + 64)


def _engines(family: Family, base: EngineConfig, options: Options) -> Engines:
    drafters = options.drafters or (*family.drafters, "ngram")
    ways: dict[str, tuple[str, tuple[str, ...]]] = {PLAIN: (PLAIN, ())}
    if "speeds" in options.parts:
        ways |= {name: (name, ()) for name in FIXED if set(FIXED[name].names) <= {*family.drafters, "ngram"}}
        ways |= {f"{AUTO}:{each.partition(':')[0]}": (AUTO, (each,)) for each in drafters}
        ways |= {AUTO: (AUTO, drafters)}
    return load_engines(ways, family, base)


def _pieces(
    family: Family, engines: Engines, cases: Sequence[Case], options: Options, done: set[Any]
) -> Iterator[dict[str, Any]]:
    for part in options.parts:
        if part == "speeds":
            for temperature in options.temperatures:
                if (family.name, part, temperature) not in done:
                    yield speeds(engines, cases, temperature, options)
        elif (family.name, part, None) not in done:
            yield _PARTS[part](family, engines, cases, options)


def speeds(engines: Engines, cases: Sequence[Case], temperature: float, options: Options) -> dict[str, Any]:
    """Every system in turns, one request at a time."""
    window = _warm_up(engines, cases, temperature, options)
    turns = []
    for number in range(options.runs):
        rng = random.Random(f"speeds {number} {temperature}")
        first = rng.randrange(len(cases))
        load = Load(1, temperature, options.tokens, window, PATIENCE * options.seconds, first)
        for name in rng.sample(sorted(engines.by_name), len(engines.by_name)):
            gc.collect()
            found = run_loop(engines.by_name[name], cases, load)
            turns.append({"system": name, "round": number, "window": asdict(found)})
    return {"part": "speeds", "temperature": temperature, "turns": turns}


def _warm_up(engines: Engines, cases: Sequence[Case], temperature: float, options: Options) -> int:
    """Prompts into the prefix caches, planners awake; returns the tokens of a run."""
    from benchmarks.matrix import fill_prefix_caches

    fill_prefix_caches(engines, cases)
    found: dict[str, Window] = {}
    for name, engine in engines.by_name.items():
        found[name] = run_loop(engine, cases, Load(1, temperature, options.tokens, sys.maxsize, options.warm_up))
    return max(LEAST_TOKENS, round(found[PLAIN].rate * options.seconds))


def forward(family: Family, engines: Engines, cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """The forward pass by query tokens."""
    from benchmarks.forward_cost import CONTEXT, ForcedTrees

    trees = ForcedTrees(engines.target)
    one = statistics.median(trees.seconds(2)[1])
    rounds = min(200, max(10, round(options.runs * options.seconds / one / 10)))
    return {
        "part": "forward",
        "context": CONTEXT,
        "times": {str(size): times for size, times in trees.seconds(rounds).items()},
    }


def limits(family: Family, engines: Engines, cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """Plain steps and the linears alone, in turns; and the machine's bandwidth and arithmetic."""
    from benchmarks.linear_times import linear_times, read_bandwidth
    from benchmarks.roofline import roofline_of

    window = max(LEAST_TOKENS, round(options.tokens / 2))
    steps, linears = [], []
    for number in range(-1, 3 * options.runs):
        found = run_loop(
            engines.by_name[PLAIN], cases, Load(1, 0.0, options.tokens, window, options.seconds * PATIENCE)
        )
        alone = linear_times(engines.target, rows=(1,), repeats=LINEAR_TURNS)[1]
        if number >= 0:
            steps.append(found.seconds / found.steps)
            linears.append(alone)
    roof = roofline_of(family.target, engines.target, read_bandwidth(options.threads))
    return {
        "part": "limits",
        "context": options.prompt_tokens,
        "steps": steps,
        "linears": linears,
        "roofline": asdict(roof),
    }


_PARTS = {"forward": forward, "limits": limits}


if __name__ == "__main__":
    sys.exit(main())
