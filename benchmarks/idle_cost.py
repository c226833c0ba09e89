"""What drafters cost where they have nothing to say: texts that never repeat.

    python -m benchmarks.idle_cost [--family demo] [--drafters ngram suffix ...] [--plan auto] [--rounds 5] ...

Prompts are random tokens, other ones in every round, and temperature 1 draws what follows; so nothing that was said
comes again but by chance. Each set of drafters runs in an engine of its own, all around one loaded target, one request
at a time, in turns with plain decoding, after a warm-up in which the planner may learn that nothing pays.

By the engine's own counters: the time in the drafters (``propose`` and ``observe``) over the time of the step, for all
steps of a round together, prompts' steps included, and for the median step. With ``--plan auto`` drafters rest when
they do not earn their time; with ``--plan fixed:nodes=16,depth=8`` they are asked in every step. The rate over plain
decoding has everything in it: what is verified in vain, too, and what a device does behind the host's back.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.command import BaseOptions, base_parser, begin_again, begun, carried_out, read
from benchmarks.family import Family
from benchmarks.settings import AUTO, PLAIN, Engines, load_engines
from decoding.config import EngineConfig
from decoding.request import GenerateRequest, SamplingParams
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document
    from decoding.engine import Engine

KIND = "idle-cost"
TREE_SLOTS = 64  # of a request, beside prompt and text


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """The command line."""

    plan: str
    rounds: int
    requests: int
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Round:
    """Some requests of one engine."""

    steps: int
    tokens: int
    seconds: float  # in steps
    drafting: float  # of it, in drafters
    median_share: float  # drafters' part of a step, the median over the steps


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = base_parser("idle_cost", "Measure what drafters cost on texts that never repeat.")
    add = parser.add_argument
    add("--plan", default=AUTO, help="auto, or fixed:nodes=16,depth=8 (default: %(default)s)")
    add("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--requests", type=positive, default=8, metavar="N", help="in a round (default: %(default)s)")
    add("--tokens", type=positive, default=128, metavar="N", help="of every request (default: %(default)s)")
    add("--prompt-tokens", type=positive, default=128, metavar="N", help="(default: %(default)s)")
    parser.set_defaults(temperatures=[1.0])
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    command = ["python", "-m", "benchmarks.idle_cost", *argv]
    return carried_out("idle-cost", lambda: _report(bench(options, command)))


def _report(document: Document) -> None:
    from benchmarks.drafters_tables import idle_text

    print(idle_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """A piece for each set of drafters and temperature; the document is in ``options.out`` after each temperature.

    Raises:
        ConfigError: a model that cannot be loaded, a document of another kind.
        RequestError: prompt and text do not fit the model.
    """
    from benchmarks.provenance import provenance
    from benchmarks.workload_systems import WITHOUT_TRAINING, labelled
    from decoding.drafters import DRAFTERS

    family, document = begun(options, KIND)
    done = {(p["family"], p["drafters"], p["temperature"], p["plan"]) for p in document.pieces}
    sets = labelled(options.drafters or [name for name in WITHOUT_TRAINING if name in DRAFTERS])
    engines = load(family, sets, options)
    document.sessions.append(provenance(command, family.models, {"saccade": engines.dtype}))
    gc.collect()
    gc.freeze()
    for temperature in options.temperatures:
        due = [name for name in sets if (family.name, name, temperature, options.plan) not in done]
        place = {"family": family.name, "temperature": temperature, "plan": options.plan}
        for piece in measure({name: engines.by_name[name] for name in (PLAIN, *due)}, temperature, options):
            document.pieces.append({**place, **piece, "session": len(document.sessions) - 1})
        document.save(options.out)
    return document


def load(family: Family, sets: dict[str, str], options: Options) -> Engines:
    """Plain decoding, and an engine for each set of drafters."""
    from benchmarks.workload_systems import members
    from decoding.cache import pages_for

    pages = 2 * pages_for(options.prompt_tokens + options.tokens + TREE_SLOTS)
    base = EngineConfig(
        str(family.target),
        dtype=options.dtype,
        device=options.device,
        num_pages=pages,
        prefix_caching=False,
        plan=options.plan,
    )
    ways: dict[str, tuple[str, Sequence[str]]] = {PLAIN: (PLAIN, ())}
    return load_engines(ways | {name: (AUTO, members(words)) for name, words in sets.items()}, family, base)


def measure(engines: dict[str, Engine], temperature: float, options: Options) -> list[dict[str, Any]]:
    """Every engine in turns, after a round that does not count."""
    found: dict[str, list[Round]] = {name: [] for name in engines}
    for number in range(-1, options.rounds):
        names = sorted(engines)
        for name in random.Random(f"idle {number} {temperature}").sample(names, len(names)):
            gc.collect()
            got = follow(engines[name], random_requests(engines[name].info.vocab_size, number, temperature, options))
            found[name] += [got] if number >= 0 else []
        print(f"T={temperature:g}: round {number + 1} of {options.rounds}", file=sys.stderr)
    plain = [asdict(each) for each in found.pop(PLAIN)]
    return [
        {"drafters": name, "rounds": [asdict(each) for each in rounds], "plain": plain}
        for name, rounds in found.items()
    ]


def random_requests(vocab_size: int, number: int, temperature: float, options: Options) -> list[GenerateRequest]:
    """Of one round: the same for every engine, no two alike."""
    lots = random.Random(f"idle prompts {number}")
    params = [
        SamplingParams(max_tokens=options.tokens, temperature=temperature, seed=lots.getrandbits(32), ignore_eos=True)
        for _ in range(options.requests)
    ]
    prompts = [tuple(lots.randrange(vocab_size) for _ in range(options.prompt_tokens)) for _ in params]
    return [GenerateRequest(str(place), *pair) for place, pair in enumerate(zip(prompts, params, strict=True))]


def follow(engine: Engine, requests: Sequence[GenerateRequest]) -> Round:
    """Serve them one after the other, with a look at the counters after every step."""
    seconds, drafting, tokens = [], [], 0
    before = engine.stats()
    for request in requests:
        engine.submit(request)
        while engine.has_work:
            tokens += sum(len(event.token_ids) for event in engine.step())
            after = engine.stats()
            seconds.append(after.step_seconds - before.step_seconds)
            drafting.append(after.draft_seconds - before.draft_seconds)
            before = after
    shares = [part / whole for part, whole in zip(drafting, seconds, strict=True) if whole > 0]
    return Round(len(seconds), tokens, sum(seconds), sum(drafting), statistics.median(shares))


if __name__ == "__main__":
    sys.exit(main())
