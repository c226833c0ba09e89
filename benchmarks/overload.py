"""``make overload``: four times the load that the server can take.

What it admits it must serve as well as ever, and what it does not admit it must say at once. The capacity is measured
first, by clients that the server admits all of, each with one request after the other. Then requests come at a multiple
of that rate, at random (Poisson), whether others have been answered or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
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

ROWS, QUEUE = 8, 16
REFUSAL_SECONDS = 0.05  # for a 429
LEAST_SHARE = 0.9  # of the capacity
TOKENS = 48


@dataclass(frozen=True)
class Report:
    """What was found. Rates are requests a second, times seconds."""

    capacity: float
    offered: float
    goodput: float
    refused: int
    refused_p50: float
    refused_p99: float
    admitted_p50: float
    admitted_p99: float
    bound: float  # for the admitted: twice the time in which a full batch and a full queue are served
    ends: dict[str, int]

    def faults(self) -> list[str]:
        """What is not as it must be."""
        found = []
        if self.goodput < LEAST_SHARE * self.capacity:
            found.append(f"goodput is {self.goodput:.1f}/s, under {LEAST_SHARE:.0%} of {self.capacity:.1f}/s")
        if self.refused_p99 > REFUSAL_SECONDS:
            found.append(f"a refusal takes {1000 * self.refused_p99:.0f} ms (p99), over {1000 * REFUSAL_SECONDS:.0f}")
        if self.admitted_p99 > self.bound:
            found.append(f"an admitted request takes {self.admitted_p99:.2f} s (p99), over {self.bound:.2f}")
        if others := {end: count for end, count in self.ends.items() if end not in ("done", "429")}:
            found.append(f"other ends: {others}")
        return found


def body(dice: random.Random) -> dict[str, Any]:
    """A streamed request of a fixed number of tokens."""
    prompt = [dice.randrange(300, 4000) for _ in range(dice.randrange(8, 64))]
    return {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "seed": dice.getrandbits(32)}


async def closed_loop(port: int, clients: int, seconds: float, dice: random.Random) -> float:
    """Requests answered a second by clients that wait for each answer."""
    until = time.monotonic() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < until:
            outcome = await ask(port, body(dice))
            answered += outcome.answered and time.monotonic() < until

    await asyncio.gather(*(client() for _ in range(clients)))
    return answered / seconds


async def open_loop(port: int, rate: float, seconds: float, dice: random.Random) -> tuple[list[Outcome], float]:
    """The ends of all requests that came at random at this rate, and those answered a second while they came."""
    tasks: list[asyncio.Task[Outcome]] = []
    started = due = time.monotonic()
    while (due := due + dice.expovariate(rate)) < started + seconds:
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        tasks.append(asyncio.create_task(ask(port, body(dice))))
    answered = sum(task.done() and task.result().answered for task in tasks)
    return list(await asyncio.gather(*tasks)), answered / seconds


async def measure(port: int, seconds: float, factor: float) -> Report:
    """Capacity, then overload."""
    dice = random.Random(3)
    await closed_loop(port, ROWS, min(3.0, seconds), dice)  # what is made at first use is there
    capacity = await closed_loop(port, ROWS + QUEUE // 2, seconds, dice)
    outcomes, goodput = await open_loop(port, factor * capacity, seconds, dice)
    refused = sorted(each.seconds for each in outcomes if each.status == 429)
    admitted = sorted(each.seconds for each in outcomes if each.answered)
    ends = Counter("429" if each.status == 429 else each.end for each in outcomes)
    return Report(
        capacity=capacity,
        offered=len(outcomes) / seconds,
        goodput=goodput,
        refused=len(refused),
        refused_p50=_quantile(refused, 0.5),
        refused_p99=_quantile(refused, 0.99),
        admitted_p50=_quantile(admitted, 0.5),
        admitted_p99=_quantile(admitted, 0.99),
        bound=2 * (ROWS + QUEUE + 1) / capacity,
        ends=dict(ends),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def table(report: Report) -> str:
    """What a person reads."""
    return "\n".join(
        (
            f"capacity          {report.capacity:8.1f} requests/s of {TOKENS} tokens",
            f"offered           {report.offered:8.1f} requests/s",
            f"goodput           {report.goodput:8.1f} requests/s ({report.goodput / report.capacity:.0%} of capacity)",
            f"429 answers       {report.refused:8d}   p50 {1000 * report.refused_p50:.1f} ms, "
            f"p99 {1000 * report.refused_p99:.1f} ms",
            f"admitted          p50 {report.admitted_p50:.2f} s, p99 {report.admitted_p99:.2f} s "
            f"(bound {report.bound:.2f} s)",
            f"ends              {report.ends}",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overload", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each part (default: %(default)s)")
    parser.add_argument("--factor", type=float, default=4.0, help="of the capacity (default: %(default)s)")
    parser.add_argument("--model", default="demo/target", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args(argv)
    port = free_port()
    limits = ("--max-num-seqs", str(ROWS), "--max-queued-requests", str(QUEUE), "--kv-cache-memory", "64MiB")
    command = [sys.executable, "-m", "server.cli", "serve", args.model, "--port", str(port), *limits]
    with closing(ChildServer(command, port, bare_environment(), 1)):
        report = asyncio.run(measure(port, args.seconds, args.factor))
    print(table(report))
    if args.out is not None:
        args.out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    for fault in report.faults():
        print(f"FAULT: {fault}")
    return 1 if report.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
