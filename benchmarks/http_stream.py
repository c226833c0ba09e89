"""How many tokens a second the HTTP process streams on one core, and how long a token takes through it.

    python -m benchmarks.http_stream [--rates 20000 40000 0] [--out FILE]

The HTTP process has a core of its own; an engine without a model, which makes events on the beat of a clock, and a
client that only reads have the other. Over so many streams at once each step of the engine is one message with an event
of four tokens for each. A token's time is from the making of its step, before the message is encoded, to the client's
having read its chunk, so that it holds a little more than the way through the HTTP process. Events that pile up are
merged into one chunk: a rate is kept up with when chunks hold what events did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.paced_engine import Pace
from benchmarks.stream_reader import Stream, post, read_streams
from decoding.errors import ConfigError
from decoding.text import Tokenizer

STREAMS, TOKENS_PER_EVENT, SECONDS = 64, 4, 5.0
RATES = (10_000.0, 20_000.0, 40_000.0, 0.0)
WARM_UP = 0.1  # of the steps, not counted
UNPACED_STEPS = 1000
WORD = "return"  # one token
COMPLETIONS = ("/v1/completions", {"prompt": WORD})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORD}]})
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Result:
    """One rate's figures. Times are in milliseconds; ``cpu`` is the HTTP process's share of its core."""

    asked: float  # tokens a second; 0: as fast as the engine can
    streamed: float  # tokens a second
    tokens_per_chunk: float
    cpu: float
    median: float
    p90: float
    p99: float
    longest: float

    def line(self) -> str:
        asked = f"{self.asked:,.0f}" if self.asked else "no limit"
        return (
            f"{asked:>10}{self.streamed:>12,.0f}{self.tokens_per_chunk:>10.2f}{self.cpu:>8.0%}"
            f"{self.median:>10.2f}{self.p90:>8.2f}{self.p99:>8.2f}{self.longest:>8.2f}"
        )


HEADING = f"{'tokens/s':>10}{'streamed':>12}{'a chunk':>10}{'cpu':>8}{'median':>10}{'p90':>8}{'p99':>8}{'longest':>8}"


def latencies(sent: Sequence[int], stream: Stream, chars_per_event: int) -> Iterator[tuple[int, int]]:
    """(step, nanoseconds from its making to its arrival) of each event of a stream; merged ones arrive together.

    Raises:
        RuntimeError: the stream's text is not that of the events.
    """
    step = chars = 0
    for arrived, length in stream.texts():
        chars += length
        while step < len(sent) and (step + 1) * chars_per_event <= chars:
            yield step, arrived - sent[step]
            step += 1
    if step != len(sent) or chars != len(sent) * chars_per_event:
        raise RuntimeError(f"a stream has {chars} characters of {len(sent)} events of {chars_per_event}")


class CpuClock:
    """CPU seconds that a process has taken (Linux)."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/stat")

    def seconds(self) -> float:
        fields = self._path.read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def http_process(pace: Pace, tokenizer: str, core: int, profile: str | None) -> Iterator[tuple[int, CpuClock]]:
    """The HTTP process on its core: (port, its clock).

    Raises:
        ConfigError: it did not start.
    """
    command = [sys.executable, "-m", "benchmarks.http_stream_server", "--tokenizer", tokenizer, "--core", str(core)]
    command += ["--pace", msgspec.json.encode(pace).decode(), *(["--profile", profile] if profile else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ConfigError("the HTTP process ended while it started; its log is above")
            yield int(line), CpuClock(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(rate: float, args: argparse.Namespace) -> Result:
    """One rate, with processes of its own.

    Raises:
        ConfigError: the HTTP process did not start.
        RuntimeError: a stream failed.
    """
    (token_id,) = Tokenizer.load(args.tokenizer).encode(WORD, add_special_tokens=False)
    per_step = args.streams * args.tokens
    steps = round(rate * args.seconds / per_step) if rate else UNPACED_STEPS
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "times.json")
        http_core, other_core = args.cores
        pace = Pace(args.streams, args.tokens, rate, token_id, other_core, str(log))
        path, prompt = CHAT if args.chat else COMPLETIONS
        body = {**prompt, "max_tokens": steps * args.tokens, "stream": True, "ignore_eos": True}
        request = post(path, json.dumps(body).encode())
        with http_process(pace, args.tokenizer, http_core, args.profile) as (port, clock):
            before = clock.seconds()
            streams = read_streams(port, [request] * args.streams)
            cpu_seconds = clock.seconds() - before
        sent: list[int] = msgspec.json.decode(log.read_bytes())
    return summary(rate, sent, streams, args.tokens, cpu_seconds)


def summary(rate: float, sent: Sequence[int], streams: Sequence[Stream], tokens: int, cpu_seconds: float) -> Result:
    """The figures of one run, without its first steps."""
    skipped = int(len(sent) * WARM_UP)
    found = [each for stream in streams for each in latencies(sent, stream, tokens * len(WORD))]
    waits = np.array([wait for step, wait in found if step >= skipped]) / 1e6
    seconds = (max(stream.texts()[-1][0] for stream in streams) - sent[0]) / 1e9
    streamed = len(streams) * len(sent) * tokens
    chunks = sum(1 for stream in streams for _, length in stream.texts() if length)
    return Result(
        asked=rate,
        streamed=streamed / seconds,
        tokens_per_chunk=streamed / chunks,
        cpu=cpu_seconds / seconds,
        median=float(np.median(waits)),
        p90=float(np.percentile(waits, 90)),
        p99=float(np.percentile(waits, 99)),
        longest=float(waits.max()),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.http_stream", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tokens a second; 0: no limit")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_EVENT, help="of an event")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions in place of /v1/completions")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each rate")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("HTTP", "OTHERS"), help="default: the first two")
    parser.add_argument("--tokenizer", default="demo/target")
    parser.add_argument("--profile", metavar="FILE", help="cProfile's statistics of the HTTP process (one rate)")
    parser.add_argument("--out", metavar="FILE", help="all figures and where they come from, in JSON")
    args = parser.parse_args(argv)
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        parser.error("the HTTP process and the rest need a core each, and there is only one")
    args.cores = args.cores or allowed[:2]
    if args.profile and len(args.rates) > 1:
        parser.error("--profile is of one rate; name it with --rates")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.sched_setaffinity(0, {args.cores[1]})
    print(f"{args.streams} streams, {args.tokens} tokens an event; times in ms\n{HEADING}", flush=True)
    results = []
    for rate in args.rates:
        results.append(measure(rate, args))
        print(results[-1].line(), flush=True)
    if args.profile:
        pstats.Stats(args.profile).sort_stats("tottime").print_stats(40)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(_report(args, results), indent=1) + "\n", encoding="utf-8")
    return 0


def _report(args: argparse.Namespace, results: Sequence[Result]) -> dict[str, Any]:
    from benchmarks.provenance import provenance  # imports torch, which would take time from what is measured

    setting = {name: getattr(args, name) for name in ("streams", "tokens", "chat", "seconds", "cores")}
    origin = provenance([sys.executable, "-m", "benchmarks.http_stream", *sys.argv[1:]], {}, {})
    return {"setting": setting, "results": [asdict(result) for result in results], "provenance": origin}


if __name__ == "__main__":
    sys.exit(main())
