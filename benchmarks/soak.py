"""``make soak``: half an hour of mixed load with clients that leave at random moments.

Resident memory and descriptors of all processes must stay flat, every answer must have an end, and the log must be
clean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.child_server import ChildServer, bare_environment, free_port
from benchmarks.raw_client import Outcome, ask

CLIENTS = 24
SAMPLES = 120  # over the whole time
MAX_GROWTH = 0.03  # of resident memory, from the second quarter of the time to the last
SLACK = 8 * 2**20  # bytes that allocators may take besides
EXPECTED = {"done", "left", "400"}


@dataclass(frozen=True)
class Sample:
    """What a process held at a time."""

    seconds: float
    process: str
    resident: int  # bytes
    descriptors: int


def sample(seconds: float, pids: dict[str, int]) -> list[Sample]:
    """Read from Linux's /proc."""
    found = []
    for name, pid in pids.items():
        resident = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        found.append(Sample(round(seconds, 1), name, int(resident) * 1024, descriptors))
    return found


def processes(pid: int) -> dict[str, int]:
    """The server's process and its children, by what they are."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    named = {"http": pid}
    for child in children:
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        named[words[2].decode().rpartition(".")[2] if len(words) > 2 else "child"] = child
    return named


def request(dice: random.Random) -> tuple[dict[str, Any], float | None]:
    """A request of any kind, and when its client leaves, if it does."""
    prompt = [dice.randrange(300, 4000) for _ in range(int(2 ** dice.uniform(2, 8)))]
    asked: dict[str, Any] = {
        "prompt": dice.choice([prompt, prompt, [prompt, prompt[:5]], "def fib(n):\n" * dice.randint(1, 20)]),
        "max_tokens": dice.randint(1, 96),
        "stream": dice.random() < 0.7,
        "n": dice.choice([1, 1, 1, 2, 4]),
        "temperature": dice.choice([0.0, 0.7, 1.0]),
        "ignore_eos": True,
    }
    if dice.random() < 0.15:
        asked["logprobs"] = dice.randint(0, 5)
    if dice.random() < 0.15:
        asked["stop"] = ["\n\n", "return"]
    if dice.random() < 0.2:
        asked["speculation"] = dice.choice([False, {"max_nodes": 4}, {"drafters": ["ngram"]}])
    if dice.random() < 0.05:
        asked["temperature"] = -1.0  # a 400
    return asked, dice.uniform(0.0, 0.5) if dice.random() < 0.25 else None


async def load(port: int, until: float, dice: random.Random, ends: Counter[str]) -> None:
    """One client, a request after the other."""
    while time.monotonic() < until:
        asked, leave = request(dice)
        ends[_end(await ask(port, asked, leave=leave))] += 1


def _end(outcome: Outcome) -> str:
    return str(outcome.status) if outcome.end == "status" else outcome.end


async def soak(server: ChildServer, port: int, minutes: float, seed: int) -> tuple[list[Sample], Counter[str]]:
    """The samples, and how the requests ended."""
    started, ends = time.monotonic(), Counter[str]()
    until = started + 60 * minutes
    clients = [asyncio.create_task(load(port, until, random.Random(seed + i), ends)) for i in range(CLIENTS)]
    samples: list[Sample] = []
    while time.monotonic() < until:
        await asyncio.sleep(60 * minutes / SAMPLES)
        samples += sample(time.monotonic() - started, processes(server.pid))
    await asyncio.gather(*clients)
    return samples, ends


def faults(samples: Sequence[Sample], ends: Counter[str], after: dict[str, float], log: str) -> list[str]:
    """What is not as it must be."""
    found = [f"{count} requests ended as {end!r}" for end, count in ends.items() if end not in EXPECTED]
    for process in dict.fromkeys(each.process for each in samples):
        mine = [each for each in samples if each.process == process]
        begin, end = (statistics.median(each.resident for each in part) for part in _quarters(mine))
        if end > begin * (1 + MAX_GROWTH) + SLACK:
            found.append(f"{process}: memory grew from {begin / 2**20:.1f} to {end / 2**20:.1f} MiB")
        first, last = (max(each.descriptors for each in part) for part in _quarters(mine))
        if last > first + CLIENTS:
            found.append(f"{process}: descriptors grew from {first} to {last}")
    if after["saccade_pages_free"] + after["saccade_pages_cached"] != after["saccade_pages_total"]:
        found.append(f"pages are missing: {after}")
    if after["saccade_running"] or after["saccade_waiting"]:
        found.append("choices are left over")
    if "Traceback" in log or "ERROR" in log:
        found.append(f"the log has errors:\n{log[-3000:]}")
    return found


def _quarters(mine: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The second and the last: in the first, what is made at first use still comes."""
    quarter = max(len(mine) // 4, 1)
    return mine[quarter : 2 * quarter] or mine, mine[-quarter:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/soak.json"), help="samples (default: %(default)s)")
    args = parser.parse_args(argv)
    port = free_port()
    flags = (
        "--speculate",
        "draft=demo/draft",
        "--speculate",
        "ngram",
        "--kv-cache-memory",
        "64MiB",
        "--port",
        str(port),
    )
    command = [sys.executable, "-m", "server.cli", "serve", "demo/target", *flags]
    with closing(ChildServer(command, port, bare_environment(), 1)) as server:
        samples, ends = asyncio.run(soak(server, port, args.minutes, args.seed))
        time.sleep(1.0)  # the engine's last report
        found = faults(samples, ends, server.metrics(), server.log())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": sys.argv, "minutes": args.minutes, "ends": ends, "samples": [asdict(s) for s in samples]}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    for process in dict.fromkeys(each.process for each in samples):
        begin, end = _quarters([each for each in samples if each.process == process])
        print(
            f"{process:16} {begin[0].resident / 2**20:7.1f} -> {end[-1].resident / 2**20:7.1f} MiB, "
            f"{begin[0].descriptors} -> {end[-1].descriptors} descriptors"
        )
    print(f"requests: {dict(ends)}; samples in {args.out}")
    for fault in found:
        print(f"FAULT: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
