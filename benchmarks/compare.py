"""Ours and others, same weights, same prompts, same machine, each at its best setting, all in one run.

    python -m benchmarks.compare [--family demo] [--peers transformers llama http] [--concurrency 1] [--tune] ...

Ours are plain decoding and ``auto`` with all drafters, the engine in this process, and with ``http`` the same behind
our server. transformers' three ways of ``generate`` are in this process, too, and take one prompt at a time;
llama.cpp's server is a process beside it, asked over the loopback. Systems take turns prompt by prompt (or, with more
requests at once, group by group, timed until the last is done), in an order that changes; every text has exactly
``--tokens`` tokens, times include the prompt, and nothing is kept of earlier prompts. With ``--tune`` each peer tries
its settings on prompts that are not measured.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import BenchOptions, begin_again, begun, bench_parser, carried_out, read
from benchmarks.family import Family, load_prompts
from benchmarks.measure import Case, Run, Task, groups
from benchmarks.settings import AUTO, PLAIN, load_engines
from decoding.config import EngineConfig
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document
    from benchmarks.systems import System

KIND = "compare"
TRIED = 4  # prompts that settings are tried on, and systems warmed up with
WARM_UPS = 2  # rounds


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """The command line."""

    peers: tuple[str, ...]
    concurrency: tuple[int, ...]
    http_threads: int | None
    llama_build: Path
    tune: bool
    rounds: int
    tokens: int


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = bench_parser("compare", "Compare with transformers and llama.cpp on the same weights.")
    add = parser.add_argument
    add("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="(default: all)")
    add("--concurrency", type=positive, nargs="+", default=[1], metavar="N", help="requests at once (default: 1)")
    add(
        "--http-threads", type=positive, default=None, metavar="N", help="of our server (default: what it takes itself)"
    )
    add("--llama-build", type=Path, default=Path("build/llama.cpp"), metavar="FOLDER", help="(default: %(default)s)")
    add("--tune", action="store_true", default=False, help="try settings of the peers first; takes minutes")
    add("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--tokens", type=positive, default=64, metavar="N", help="of every text (default: %(default)s)")
    parser.set_defaults(prompts=10)
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    return carried_out("bench-compare", lambda: _report(bench(options, ["python", "-m", "benchmarks.compare", *argv])))


def _report(document: Document) -> None:
    from benchmarks.peer_tables import compare_text

    print(compare_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """A piece for each temperature; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: a model that cannot be loaded, a peer that is not there, a document of another kind.
    """
    from benchmarks.provenance import provenance

    family, document = begun(options, KIND)
    done = {(piece["family"], piece["temperature"], piece["concurrency"]) for piece in document.pieces}
    places = [(t, c) for c in options.concurrency for t in options.temperatures if (family.name, t, c) not in done]
    if not places:
        return document
    cases = load_prompts(family.target, options.prompts + TRIED, options.prompt_tokens)
    document.sessions.append(provenance(command, family.models, {"all": options.dtype}))
    for place in places:  # settings that are best at one temperature need not be at another
        piece = compare_at(Place(family, *place), cases, options)
        document.pieces.append({**piece, "session": len(document.sessions) - 1})
        document.save(options.out)
    return document


@dataclass(frozen=True)
class Place:
    """What is compared where."""

    family: Family
    temperature: float
    concurrency: int


def compare_at(place: Place, cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """All systems, started, warmed up, measured and ended."""
    with contextlib.ExitStack() as running:
        systems = load_systems(place, options, cases, running)
        runs = list(measure(systems, cases[: options.prompts], place, options))
    return {
        "family": place.family.name,
        "temperature": place.temperature,
        "concurrency": place.concurrency,
        "settings": {system.name: getattr(system, "setting", "") for system in systems},
        "runs": [asdict(run) for run in runs],
    }


def load_systems(place: Place, options: Options, cases: Sequence[Case], running: contextlib.ExitStack) -> list[System]:
    """Ours, and the peers at their best settings; ``running`` ends them."""
    from benchmarks.systems import EngineSystem
    from benchmarks.tuning import Trial
    from decoding.cache import pages_for

    pages = 2 * place.concurrency * pages_for(max(len(case.ids) for case in cases) + options.tokens + 64)
    base = EngineConfig(
        str(place.family.target), dtype=options.dtype, device=options.device, num_pages=pages, prefix_caching=False
    )
    engines = load_engines({PLAIN: (PLAIN, ()), AUTO: (AUTO, options.drafters)}, place.family, base)
    systems: list[System] = [EngineSystem(name, each, place.concurrency) for name, each in engines.by_name.items()]
    trial = Trial(tuple(cases[options.prompts :]), options.tokens, place.temperature) if options.tune else None
    for name in options.peers:
        for peer in PEERS[name](place, engines.dtype, options, trial):
            running.callback(peer.close)
            systems.append(peer)
    return systems


def _llama(place: Place, dtype: str, options: Options, trial: Any) -> Sequence[Any]:
    from benchmarks.llama_cpp import load_llama

    folders = str(place.family.target), _draft(place.family)
    build, batch = options.llama_build, place.concurrency
    return load_llama(*folders, dtype, options.threads, build, batch=batch, trial=trial)


def _transformers(place: Place, dtype: str, options: Options, trial: Any) -> Sequence[Any]:
    from benchmarks.peers import load_transformers

    if place.concurrency > 1:
        print("transformers: left out, it speculates for one prompt at a time", file=sys.stderr)
        return []
    folders = str(place.family.target), _draft(place.family)
    return load_transformers(*folders, dtype, options.threads, device=options.device, trial=trial)


def _http(place: Place, dtype: str, options: Options, trial: Any) -> Sequence[Any]:
    from benchmarks.http_systems import HttpSystem

    words = [str(place.family.target), "--dtype", dtype, "--device", options.device]
    words += ["--threads", str(options.http_threads)] if options.http_threads else []
    drafters = place.family.speculate(options.drafters or (*place.family.drafters, "ngram"))
    speculate = [word for drafter in drafters for word in ("--speculate", drafter)]
    plain = HttpSystem(f"http-{PLAIN}", words, place.concurrency)
    try:
        return [plain, HttpSystem(f"http-{AUTO}", [*words, *speculate], place.concurrency)]
    except BaseException:
        plain.close()
        raise


def _draft(family: Family) -> str | None:
    return str(family.drafters["draft"]) if "draft" in family.drafters else None


PEERS: Mapping[str, Callable[[Place, str, Options, Any], Sequence[Any]]] = {
    "transformers": _transformers,
    "llama": _llama,
    "http": _http,
}


def measure(systems: Sequence[System], cases: Sequence[Case], place: Place, options: Options) -> Iterator[Run]:
    """Every system on every prompt in every round, after a warm-up of all of them."""
    whole = [filled for _, filled in groups(cases, place.concurrency)]
    for number in range(-WARM_UPS, options.rounds):
        some = whole[:TRIED] if number < 0 else whole
        tasks = [Task(number, place.temperature, together, options.tokens) for together in some]
        yield from (run for run in in_turns(systems, tasks) if number >= 0)
        if number >= 0:
            print(f"T={place.temperature:g}: round {number + 1} of {options.rounds}", file=sys.stderr)


def in_turns(systems: Sequence[System], tasks: Sequence[Task]) -> Iterator[Run]:
    """Every system on each task, in an order that is by chance, but the same in every measurement."""
    for task in tasks:
        key = f"{task.round} {task.temperature} {task.cases[0].index}"
        for system in random.Random(key).sample(systems, len(systems)):
            gc.collect()
            yield system.run(task)


if __name__ == "__main__":
    sys.exit(main())
