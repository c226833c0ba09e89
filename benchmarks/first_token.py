"""How long texts wait for their first token under drafting, and for what, against plain decoding.

    python -m benchmarks.first_token [--family demo] [--streams 1 8 32] [--prompt-lengths 16 256 768] [--load 0.6] ...

Plain decoding and ``auto`` with the given drafters, two engines around one target, take turns on the same requests at
the same times. Closed loop: so many requests in flight, each followed by the next one after a pause, as a client
makes it, which lets it come in the middle of a step. Open loop: random arrivals at a share of what plain decoding was
seen to serve with as many streams, the same for both, so that faster answers do not bring more prompts. Ratios are of
medians within a round; the median over the rounds is shown, and the lowest and highest.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import BaseOptions, base_parser, begin_again, begun, carried_out, read
from benchmarks.family import PROMPTS, Family, load_prompts
from benchmarks.settings import AUTO, PLAIN, load_engines
from benchmarks.timed_loop import CpuClock, First, Pass, WallClock, closed_loop, open_loop
from decoding.config import EngineConfig
from decoding.request import GenerateRequest, SamplingParams
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document
    from decoding.engine import Engine

KIND = "first-token"
LOOPS = ("closed", "open")
CLOCKS = {"wall": WallClock, "cpu": CpuClock}
WARM_UPS = 3  # rounds that do not count: in the first one the load is found, and the planner learns what pays
TREE_SLOTS = 64  # of a request, beside prompt and text
SHOWN = {"waited": (), "drafting": ("drafters", "planner"), "forward": ("forward",)}  # parts that are shown


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """The command line."""

    streams: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    loops: tuple[str, ...]
    load: float
    clock: str
    pause: float
    rounds: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Place:
    """What is measured where."""

    loop: str
    streams: int
    prompt_length: int
    temperature: float


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = base_parser("first_token", "Measure the time to the first token under drafting.")
    add = parser.add_argument
    add("--streams", type=positive, nargs="+", default=[1, 8, 32], metavar="N", help="(default: 1 8 32)")
    lengths = [16, 256, 768]
    add("--prompt-lengths", type=positive, nargs="+", default=lengths, metavar="N", help="(default: 16 256 768)")
    add("--loops", nargs="+", default=list(LOOPS), choices=LOOPS, help="(default: both)")
    add("--load", type=float, default=0.6, metavar="SHARE", help="of the open loop (default: %(default)s)")
    add("--clock", default="wall", choices=CLOCKS, help="cpu: of the process, for busy machines, with --threads 1")
    add("--pause", type=float, default=1.0, metavar="MS", help="of a client (default: %(default)s)")
    add("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--requests", type=positive, default=4, metavar="N", help="a stream, in a round (default: %(default)s)")
    add("--tokens", type=positive, default=64, metavar="N", help="of a text, half more or less (default: %(default)s)")
    parser.set_defaults(temperatures=[0.0])
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    return carried_out("first-token", lambda: bench(options, ["python", "-m", "benchmarks.first_token", *argv]))


def bench(options: Options, command: Sequence[str]) -> None:
    """A piece for each place; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: a model that cannot be loaded, a document of another kind.
        RequestError: prompt and text do not fit the model.
    """
    from benchmarks.provenance import provenance

    family, document = begun(options, KIND)
    done = {
        tuple(piece[name] for name in ("loop", "streams", "prompt_length", "temperature")) for piece in document.pieces
    }
    engines = _engines(family, options)
    document.sessions.append(provenance(command, family.models, {"all": options.dtype}))
    ids = _text(family)
    gc.collect()
    gc.freeze()
    print(HEADING, flush=True)
    for place in places(options):
        if place not in done:
            _measure(place, engines, ids, options, document)


def places(options: Options) -> list[Place]:
    """All of them, loops innermost: the open one needs to know what the closed one served."""
    return [
        Place(loop, streams, length, temperature)
        for temperature in options.temperatures
        for streams in options.streams
        for length in options.prompt_lengths
        for loop in options.loops
    ]


def _engines(family: Family, options: Options) -> dict[str, Engine]:
    from decoding.cache import pages_for

    longest = max(options.prompt_lengths) + 2 * options.tokens + TREE_SLOTS
    pages = 2 * max(options.streams) * pages_for(longest)
    base = EngineConfig(
        str(family.target), dtype=options.dtype, device=options.device, num_pages=pages, prefix_caching=False
    )
    return load_engines({PLAIN: (PLAIN, ()), AUTO: (AUTO, options.drafters)}, family, base).by_name


def _text(family: Family) -> list[int]:
    """All prompts one after the other."""
    count = len(Path(PROMPTS).read_text(encoding="utf-8").splitlines())
    return [token for case in load_prompts(family.target, count, sys.maxsize) for token in case.ids]


def _measure(place: Place, engines: Mapping[str, Engine], ids: list[int], options: Options, document: Document) -> None:
    rounds: list[dict[str, Pass]] = []
    rate, clock = 0.0, CLOCKS[options.clock]()
    for number in range(-WARM_UPS, options.rounds):
        requests = requests_of(place, number, ids, options)
        passes = {}
        for name in random.Random(f"{place} {number}").sample(sorted(engines), len(engines)):
            gc.collect()
            if place.loop == "closed" or number == -WARM_UPS:
                passes[name] = closed_loop(engines[name], requests, place.streams, options.pause / 1e3, clock)
            else:
                passes[name] = open_loop(engines[name], requests, arrivals(number, len(requests), rate), clock)
        if number == -WARM_UPS:
            rate = options.load * len(requests) / passes[PLAIN].seconds
        rounds += [passes] if number >= 0 else []
    document.pieces.append({**asdict(place), **summary(rounds, place), "session": len(document.sessions) - 1})
    document.save(options.out)
    print(line(document.pieces[-1]), flush=True)


def requests_of(place: Place, number: int, ids: list[int], options: Options) -> list[GenerateRequest]:
    """Of one round: windows of the text, others in each round."""
    lots = random.Random(f"first token {number} {place.prompt_length}")
    made = []
    for index in range(options.requests * max(place.streams, 4)):
        first = lots.randrange(len(ids) - place.prompt_length)
        tokens = round(options.tokens * lots.uniform(0.5, 1.5))  # texts of one length would all end at once
        params = SamplingParams(tokens, place.temperature, seed=lots.getrandbits(32), ignore_eos=True)
        made.append(GenerateRequest(f"r{index}", tuple(ids[first : first + place.prompt_length]), params))
    return made


def arrivals(number: int, count: int, rate: float) -> list[float]:
    """Seconds from the beginning at which requests come, at random."""
    lots = random.Random(f"arrivals {number}")
    return list(accumulate(lots.expovariate(rate) for _ in range(count)))


def summary(rounds: Sequence[Mapping[str, Pass]], place: Place) -> dict[str, Any]:
    """Medians of each system, ratios of auto to plain within the rounds, and whether the texts were the same."""
    skipped = place.streams if place.loop == "closed" else 0  # they came all at once
    firsts = {name: [list(each[name].firsts[skipped:]) for each in rounds] for name in rounds[0]}
    rates = {name: [each[name].tokens / each[name].seconds for each in rounds] for name in rounds[0]}
    return {
        "requests": sum(map(len, firsts[PLAIN])),
        "ms": {name: _medians([first for some in of for first in some]) for name, of in firsts.items()},
        "ttft": _ratios([(_ttft(a), _ttft(p)) for a, p in zip(firsts[AUTO], firsts[PLAIN], strict=True)]),
        "rate": _ratios(list(zip(rates[AUTO], rates[PLAIN], strict=True))),
        "same_text": all(each[AUTO].texts == each[PLAIN].texts for each in rounds),
    }


def _medians(firsts: Sequence[First]) -> dict[str, float]:
    """Milliseconds of TTFT (median and 90th percentile) and of its parts; drafted nodes on the way."""
    times = sorted(first.ttft for first in firsts)
    found = {"ttft": 1e3 * statistics.median(times), "p90": 1e3 * times[int(0.9 * (len(times) - 1))]}
    for name, parts in SHOWN.items():
        each = [sum(first.parts[part] for part in parts) if parts else first.waited for first in firsts]
        found[name] = 1e3 * statistics.median(each)
    return {**found, "nodes": statistics.mean(first.nodes for first in firsts)}


def _ttft(firsts: Sequence[First]) -> float:
    return statistics.median(first.ttft for first in firsts)


def _ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Median, lowest and highest."""
    found = [ours / theirs for ours, theirs in pairs]
    return [statistics.median(found), min(found), max(found)]


HEADING = (
    f"{'loop':<7}{'streams':>8}{'prompt':>7} {'T':>3} | plain: TTFT {'p90':>7} waited forward"
    f" | auto: TTFT {'p90':>7} waited drafting forward nodes | TTFT auto/plain {'':9} tokens/s auto/plain"
)


def line(piece: Mapping[str, Any]) -> str:
    """A place's figures."""
    plain, auto = piece["ms"][PLAIN], piece["ms"][AUTO]
    place = f"{piece['loop']:<7}{piece['streams']:>8}{piece['prompt_length']:>7} {piece['temperature']:>3g}"
    ours = f"{auto['ttft']:>10.2f} {auto['p90']:>7.2f} {auto['waited']:>6.2f} {auto['drafting']:>8.2f}"
    ratios = [f"{middle:.3f} [{low:.3f}, {high:.3f}]" for middle, low, high in (piece["ttft"], piece["rate"])]
    return (
        f"{place} | {plain['ttft']:>11.2f} {plain['p90']:>7.2f} {plain['waited']:>6.2f} {plain['forward']:>7.2f}"
        f" | {ours} {auto['forward']:>7.2f} {auto['nodes']:>5.1f} | {ratios[0]:<24} {ratios[1]}"
        + ("" if piece["same_text"] else "  OTHER TEXT")
    )


if __name__ == "__main__":
    sys.exit(main())
