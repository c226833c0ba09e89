"""What serving over HTTP costs: the same requests to an engine used as a library and to our server, in turns.

    python -m benchmarks.http_cost [--family demo] [--streams 32] [--settings plain auto] [--threads 1] ...

The engine is in a child process; so is the server's, with the same settings and the same number of threads, and the
HTTP process beside it is one more. The client, this process, reads raw sockets and parses when all have ended. A task
is so many prompts at once, each continued by the same number of tokens, timed until the last one is done.

CPU seconds of each process stand beside the rates: where there are as few cores as here, the client takes time that it
would take on another machine, and which is none of the server's.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.child_server import ChildServer, free_port
from benchmarks.command import BenchOptions, bench_parser, carried_out, opened, read
from benchmarks.engine_child import Child
from benchmarks.family import Family, load_prompts
from benchmarks.http_stream import CpuClock
from benchmarks.http_systems import completion_body
from benchmarks.measure import Case, Task, groups
from benchmarks.settings import AUTO, PLAIN, config_of
from benchmarks.stream_reader import Stream, post, read_streams
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from decoding.text import Tokenizer
from server.engine_launch import engine_environment
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document

KIND = "http-cost"
LIBRARY, SERVER = "library", "http"
WARM_UPS = 2  # rounds
TREE_SLOTS = 64  # of a request, beside prompt and text
_TEXT = re.compile(rb'"text":("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """The command line."""

    settings: tuple[str, ...]
    streams: int
    rounds: int
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One task done by one of the two."""

    seconds: float
    tokens: int
    cpu: dict[str, float]  # process -> CPU seconds: "engine", and of the server "http", "client"
    chunks: int  # of the answers together
    texts: list[str]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = bench_parser("http_cost", "Measure what serving over HTTP costs against in-process use.")
    add = parser.add_argument
    add("--settings", nargs="+", default=[PLAIN, AUTO], choices=(PLAIN, AUTO), help="(default: both)")
    add("--streams", type=positive, default=32, metavar="N", help="requests at once (default: %(default)s)")
    add("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--tokens", type=positive, default=128, metavar="N", help="of every text (default: %(default)s)")
    parser.set_defaults(threads=1, prompts=32, temperatures=[0.0])
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    return carried_out("http-cost", lambda: bench(options, ["python", "-m", "benchmarks.http_cost", *argv]))


def bench(options: Options, command: Sequence[str]) -> None:
    """A piece for each setting and temperature; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: a model that cannot be loaded, a document of another kind.
        RuntimeError: a stream broke off.
    """
    family = Family.find(options.family)
    document = opened(options.out, KIND, resume=options.resume)
    done = {(piece["setting"], piece["temperature"]) for piece in document.pieces}
    cases = load_prompts(family.target, options.prompts, options.prompt_tokens)
    session = len(document.sessions)
    print(HEADING, flush=True)
    for setting in options.settings:
        left = [temperature for temperature in options.temperatures if (setting, temperature) not in done]
        for temperature, samples in measure(setting, left, family, cases, options) if left else ():
            place = {"setting": setting, "temperature": temperature, "streams": options.streams}
            document.pieces.append({**place, **summary(samples), "session": session})
            print(line(document.pieces[-1]), flush=True)
    _save(document, family, options, command)


def _save(document: Document, family: Family, options: Options, command: Sequence[str]) -> None:
    from benchmarks.provenance import provenance  # imports torch, which the client has no use for

    origin = provenance(command, family.models, {"all": options.dtype})
    document.sessions.append({**origin, "threads": options.threads})
    document.save(options.out)


def measure(
    setting: str, temperatures: Sequence[float], family: Family, cases: Sequence[Case], options: Options
) -> Iterator[tuple[float, list[dict[str, Sample]]]]:
    """Both of them on all tasks, in turns: of each temperature, a sample of each for every task after the warm-up."""
    from decoding.cache import pages_for

    longest = max(len(case.ids) for case in cases) + options.tokens + TREE_SLOTS
    base = EngineConfig(
        str(family.target),
        dtype=options.dtype,
        device=options.device,
        num_pages=2 * options.streams * pages_for(longest),
        prefix_caching=False,
        generation_config="vllm",
        threads=options.threads,
    )
    config = config_of(setting, family, base, options.drafters)
    tokenizer = Tokenizer.load(family.target)
    with running_library(config, tokenizer) as library, running_server(config) as server:
        for temperature in temperatures:
            samples: list[dict[str, Sample]] = []
            for number in range(-WARM_UPS, options.rounds):
                for _, together in groups(cases, options.streams):
                    task = Task(number, temperature, together, options.tokens)
                    ways = {LIBRARY: library, SERVER: server}
                    order = random.Random(f"{number} {together[0].index}").sample(sorted(ways), len(ways))
                    found = {name: ways[name](task) for name in order}
                    samples += [found] if number >= 0 else []
            yield temperature, samples


@contextmanager
def running_library(config: EngineConfig, tokenizer: Tokenizer) -> Iterator[Callable[[Task], Sample]]:
    """An engine in a child process."""
    child = Child(config, engine_environment(config, os.environ))

    def run(task: Task) -> Sample:
        done = child.run(task)
        texts = [tokenizer.decode(ids) for ids in done.texts]
        return Sample(done.seconds, sum(map(len, done.texts)), {"engine": done.cpu_seconds}, 0, texts)

    try:
        yield run
    finally:
        child.close()


@contextmanager
def running_server(config: EngineConfig) -> Iterator[Callable[[Task], Sample]]:
    """``saccade serve`` with the same settings, asked by this process."""
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", *arguments(config), "--port", str(port)]
    server = ChildServer(command, port, os.environ, 1)
    try:
        clocks = {"http": CpuClock(server.pid), "engine": CpuClock(engine_of(server.pid))}

        def run(task: Task) -> Sample:
            bodies = [completion_body(case.ids, case.seed, task) for case in task.cases]
            requests = [post("/v1/completions", json.dumps(body).encode()) for body in bodies]
            before = {name: clock.seconds() for name, clock in clocks.items()}
            client, started = time.process_time(), time.perf_counter()
            streams = read_streams(port, requests)
            seconds, client = time.perf_counter() - started, time.process_time() - client
            cpu = {name: clock.seconds() - before[name] for name, clock in clocks.items()}
            return sample_of(streams, seconds, {**cpu, "client": client}, task)

        yield run
    finally:
        server.close()


def arguments(config: EngineConfig) -> list[str]:
    """The command line of a server with these settings."""
    words = [
        config.model,
        "--no-prefix-caching",
        "--threads",
        str(config.threads),
        "--num-pages",
        str(config.num_pages),
    ]
    words += ["--dtype", config.dtype, "--device", config.device, "--generation-config", config.generation_config]
    return [*words, *[word for drafter in config.speculate for word in ("--speculate", drafter)]]


def engine_of(server: int) -> int:
    """The process id of a server's engine process (Linux).

    Raises:
        ConfigError: it has none.
    """
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        for child in children.read_text(encoding="ascii").split():
            if b"server.engine_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise ConfigError(f"the server {server} has no engine process; this benchmark needs /proc as Linux has it")


def sample_of(streams: Sequence[Stream], seconds: float, cpu: dict[str, float], task: Task) -> Sample:
    """What came over the connections.

    Raises:
        RuntimeError: a stream broke off, or has another number of tokens than was asked for.
    """
    texts, chunks = [], 0
    for stream in streams:
        whole = b"".join(stream.pieces)
        counted = re.findall(rb'"completion_tokens":(\d+)', whole)
        if not counted or int(counted[-1]) != task.tokens or b"data: [DONE]\n\n" not in whole:
            raise RuntimeError(f"a stream is not what was asked for: it ends with {whole[-300:]!r}")
        parts = [json.loads(found) for found in _TEXT.findall(whole)]
        texts.append("".join(parts))
        chunks += len(parts)
    return Sample(seconds, task.tokens * len(task.cases), cpu, chunks, texts)


def summary(samples: Sequence[Mapping[str, Sample]]) -> dict[str, Any]:
    """Rates and their ratio (median, lowest, highest of the tasks), CPU milliseconds of 1000 tokens, same texts."""
    ratios = [found[SERVER].rate / found[LIBRARY].rate for found in samples]
    pairs = [texts for found in samples for texts in zip(found[SERVER].texts, found[LIBRARY].texts, strict=True)]
    served = [found[SERVER] for found in samples]
    return {
        "rates": {name: statistics.median(found[name].rate for found in samples) for name in (LIBRARY, SERVER)},
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "cpu": {
            LIBRARY: _cpu([found[LIBRARY] for found in samples], "engine"),
            **{name: _cpu(served, name) for name in ("engine", "http", "client")},
        },
        "tokens_per_chunk": sum(each.tokens for each in served) / sum(each.chunks for each in served),
        "same_text": [sum(ours == theirs for ours, theirs in pairs), len(pairs)],
    }


def _cpu(samples: Sequence[Sample], process: str) -> float:
    return 1e6 * sum(each.cpu[process] for each in samples) / sum(each.tokens for each in samples)


HEADING = (
    f"{'setting':<8}{'T':>3} | tokens/s: {LIBRARY:>8} {SERVER:>8}   ratio {'':18}"
    f" | CPU ms of 1000 tokens: {LIBRARY:>8} engine   http client | tokens a chunk, same text"
)


def line(piece: Mapping[str, Any]) -> str:
    """A place's figures."""
    rates, cpu = piece["rates"], piece["cpu"]
    ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*piece["ratio"])
    same = "{} of {}".format(*piece["same_text"])
    return (
        f"{piece['setting']:<8}{piece['temperature']:>3g} | {rates[LIBRARY]:>18.1f} {rates[SERVER]:>8.1f}   {ratio:<24}"
        f" | {cpu[LIBRARY]:>31.1f} {cpu['engine']:>6.1f} {cpu['http']:>6.1f} {cpu['client']:>6.1f}"
        f" | {piece['tokens_per_chunk']:>14.2f}, {same}"
    )


if __name__ == "__main__":
    sys.exit(main())
