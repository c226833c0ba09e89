"""Every drafter on texts that repeat: tokens per step and speed beside plain decoding and other engines' lookups.

    python -m benchmarks.drafters [--workloads code-editing ...] [--peers transformers llama] [--temperatures 0]
        [--drafters ngram suffix retrieval=PATH ngram+draft ...] [--plan auto] ...

The workloads of benchmarks/workloads are served one request after the other. All systems (ours around one loaded
target; transformers' ``prompt_lookup_num_tokens`` in this process; llama.cpp's server with its n-grams over the
loopback) take turns request by request, in an order that changes, for some rounds after one that does not count. Times
include the prompt; no K/V is kept from one request to the next. What was said in earlier requests of the same round
may be used, what was said in other rounds not: see workload_systems.py. The result is written after each table.

At temperature 0, with a drafter ``prediction``, two more tables: requests whose prediction is the target's own answer,
and the same with one line in twenty edited.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import workload_files
from benchmarks.command import BaseOptions, base_parser, begin_again, begun, carried_out, read
from benchmarks.compare import in_turns
from benchmarks.family import Family
from benchmarks.measure import Run, Task
from benchmarks.settings import AUTO, PLAIN, Engines, load_engines
from benchmarks.workload_files import Workload
from decoding.config import EngineConfig
from server.flags import positive, whole

if TYPE_CHECKING:
    from benchmarks.documents import Document
    from benchmarks.systems import System
    from benchmarks.workload_systems import WorkloadSystem
    from decoding.text import Tokenizer

KIND = "drafters"
TRIED = 3  # requests that peers' settings are tried on, the last of a workload; nobody is measured on them
TREE_SLOTS = 64  # of a request, beside prompt and answer
OWN, EDITED = "own", "edited"  # predictions that are made of the target's answers


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """The command line."""

    workloads: tuple[str, ...]
    peers: tuple[str, ...]
    plan: str
    max_nodes: int
    max_depth: int
    llama_build: Path
    tune: bool
    rounds: int
    requests: int | None
    tokens: int | None


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = base_parser("drafters", "Measure every drafter on workloads that repeat what was said.")
    add = parser.add_argument
    add("--workloads", nargs="+", default=[], metavar="NAME", help="names or JSONL files (default: all that are here)")
    add("--peers", nargs="*", default=[], choices=["transformers", "llama"], help="(default: none)")
    add("--plan", default=AUTO, help="of our engine: auto, or fixed:nodes=24,depth=8 (default: %(default)s)")
    add("--max-nodes", type=whole, default=EngineConfig.max_nodes, metavar="N", help="(default: %(default)s)")
    add("--max-depth", type=whole, default=EngineConfig.max_depth, metavar="N", help="(default: %(default)s)")
    add("--llama-build", type=Path, default=Path("build/llama.cpp"), metavar="FOLDER", help="(default: %(default)s)")
    add("--tune", action="store_true", default=False, help=f"try settings of the peers on {TRIED} requests first")
    add("--rounds", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    add("--requests", type=positive, default=None, metavar="N", help="the first N of each workload (default: all)")
    add("--tokens", type=positive, default=None, metavar="N", help="of an answer, at most (default: the workload's)")
    parser.set_defaults(temperatures=[0.0])
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    command = ["python", "-m", "benchmarks.drafters", *argv]
    return carried_out("bench-drafters", lambda: _report(bench(options, command)))


def _report(document: Document) -> None:
    from benchmarks.drafters_tables import drafters_text

    print(drafters_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """A piece for each workload and temperature; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: a model, a workload or a peer that is not there, a document of another kind.
        RequestError: a request that does not fit the model.
    """
    from benchmarks.provenance import provenance
    from benchmarks.workload_systems import default_sets, labelled
    from decoding.text import Tokenizer

    family, document = begun(options, KIND)
    sets = labelled(options.drafters or default_sets(family))
    tokenizer = Tokenizer.load(family.target)
    found = [workload_files.load(name, tokenizer) for name in options.workloads or workload_files.names()]
    workloads = [each.first(options.requests, options.tokens) for each in found]
    engines = load(family, sets, workloads, options)
    document.sessions.append(provenance(command, family.models, {"saccade": engines.dtype}))
    gc.collect()
    gc.freeze()  # what is loaded need not be looked through again in somebody's measured time
    work = Bench(family, engines, tokenizer, options, {Place.of(piece) for piece in document.pieces})
    for piece in work.pieces(workloads):
        document.pieces.append({**piece, "sets": sets, "session": len(document.sessions) - 1})
        document.save(options.out)
    return document


@dataclass(frozen=True)
class Place:
    """What a piece is about."""

    family: str
    workload: str
    prediction: str  # "": the workload's own, if it has any; OWN, EDITED: made of the target's answers
    temperature: float
    plan: str

    @classmethod
    def of(cls, piece: dict[str, Any]) -> Place:
        return cls(**{each.name: piece[each.name] for each in fields(cls)})


def load(family: Family, sets: dict[str, str], workloads: Sequence[Workload], options: Options) -> Engines:
    """Plain decoding, and an engine for each set of drafters."""
    from benchmarks.workload_systems import members
    from decoding.cache import pages_for

    base = EngineConfig(
        str(family.target),
        dtype=options.dtype,
        device=options.device,
        num_pages=2 * pages_for(max(workload.longest for workload in workloads) + TREE_SLOTS),
        prefix_caching=False,
        plan=options.plan,
        max_nodes=options.max_nodes,
        max_depth=options.max_depth,
    )
    ways: dict[str, tuple[str, Sequence[str]]] = {PLAIN: (PLAIN, ())}
    ways |= {name: (AUTO, members(words)) for name, words in sets.items()}
    return load_engines(ways, family, base)


@dataclass(frozen=True)
class Bench:
    """What all pieces share."""

    family: Family
    engines: Engines
    tokenizer: Tokenizer
    options: Options
    done: set[Place]

    def pieces(self, workloads: Sequence[Workload]) -> Iterator[dict[str, Any]]:
        """All that are not done."""
        for workload in workloads:
            for temperature in self.options.temperatures:
                yield from self._at(workload, temperature)

    def _at(self, workload: Workload, temperature: float) -> Iterator[dict[str, Any]]:
        """A piece with the workload's own predictions, if it has any, and those with others."""
        places = [self._place(workload, kind, temperature) for kind in self._predictions(workload, temperature)]
        places = [place for place in places if place not in self.done]
        if not places:
            return
        measured = self._measured(workload)
        plain = self._ours("answers", [PLAIN])[0]
        answers = [plain.complete(task)[0] for task in tasks(measured, 0, temperature)]
        for place in places:
            part = measured if not place.prediction else self._predicted(measured, answers, place.prediction)
            piece = self._piece(place, workload, part)
            yield {**piece, "known": workload_files.known_shares(measured, answers)}
            print(f"{place.workload} {place.prediction} T={temperature:g}: done", file=sys.stderr)

    def _place(self, workload: Workload, prediction: str, temperature: float) -> Place:
        return Place(self.family.name, workload.name, prediction, temperature, self.options.plan)

    def _predictions(self, workload: Workload, temperature: float) -> tuple[str, ...]:
        return ("", OWN, EDITED) if temperature == 0 and workload.predicts and self._predicting() else ("",)

    def _predicting(self) -> list[str]:
        from benchmarks.workload_systems import PREDICTION

        return [name for name, engine in self.engines.by_name.items() if PREDICTION in engine.info.drafters]

    def _measured(self, workload: Workload) -> Workload:
        """Without the requests that settings are tried on."""
        left = len(workload.requests) - TRIED
        return workload.first(left, None) if self.options.tune and self.options.peers and left > 0 else workload

    def _predicted(self, workload: Workload, answers: Sequence[Sequence[int]], prediction: str) -> Workload:
        texts = [self.tokenizer.decode(answer) for answer in answers]
        texts = workload_files.edited(texts) if prediction == EDITED else texts
        return workload_files.predicting(workload, texts, self.tokenizer)

    def _ours(self, scope: str, names: Sequence[str]) -> list[WorkloadSystem]:
        from benchmarks.workload_systems import WorkloadSystem

        return [WorkloadSystem(name, self.engines.by_name[name], scope) for name in names]

    def _peers(self, workload: Workload, temperature: float, running: ExitStack) -> list[System]:
        from benchmarks.tuning import Trial
        from benchmarks.workload_systems import PeerOptions, peers

        options, tried = self.options, workload.requests[-TRIED:]
        trial = Trial(tried, min(each.tokens for each in tried), temperature) if options.tune else None
        settings = PeerOptions(self.engines.dtype, options.device, options.threads, options.llama_build, trial)
        return peers(options.peers, self.family, settings, running)

    def _piece(self, place: Place, whole: Workload, part: Workload) -> dict[str, Any]:
        """All systems, or those that use predictions where those are what differs."""
        names = [PLAIN, *self._predicting()] if place.prediction else list(self.engines.by_name)
        with ExitStack() as running:
            systems: list[System] = [*self._ours(str(place), names)]
            systems += [] if place.prediction else self._peers(whole, place.temperature, running)
            runs = list(self._runs(systems, part, place.temperature))
        return {
            **asdict(place),
            "limits": [self.options.max_nodes, self.options.max_depth],
            "requests": len(part.requests),
            "tokens": sum(request.tokens for request in part.requests),
            "settings": {system.name: getattr(system, "setting", "") for system in systems},
            "runs": [asdict(run) for run in runs],
        }

    def _runs(self, systems: Sequence[System], workload: Workload, temperature: float) -> Iterator[Run]:
        """Every system on every request in every round, after a round that does not count: planners learn in it."""
        for number in range(-1, self.options.rounds):
            yield from (run for run in in_turns(systems, tasks(workload, number, temperature)) if number >= 0)


def tasks(workload: Workload, number: int, temperature: float) -> list[Task]:
    """One round of a workload, in its order."""
    return [Task(number, temperature, (request,), request.tokens) for request in workload.requests]


if __name__ == "__main__":
    sys.exit(main())
