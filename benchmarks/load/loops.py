"""Closed and open loops over one server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.load.arrivals import arrival_times
from benchmarks.load.client import Job, LoadClient
from benchmarks.load.counters import Counters, read_counters
from benchmarks.load.lag import Lag, watched
from benchmarks.load.records import Record
from benchmarks.load.settings import Load

Send = Callable[[Job, float], Coroutine[Any, Any, None]]
Advance = Callable[[Record], None]


@dataclass(frozen=True)
class Turn:
    """One server's part of a round.

    Attributes:
        records: in the order in which requests were to be sent.
        started: by the clock of the records, in seconds.
        closed: when the window closed in which tokens count: at the last end, or after the given duration.
        counters: what the server counted meanwhile; None: it tells nothing.
    """

    server: str
    load: Load
    round: int
    records: tuple[Record, ...]
    started: float
    closed: float
    lag: Lag
    counters: Counters | None = None

    @property
    def seconds(self) -> float:
        return self.closed - self.started


@dataclass(frozen=True)
class Bounds:
    """Of a turn: a number of requests, or seconds in which they are sent."""

    requests: int
    duration: float | None = None


async def run_turn(
    client: LoadClient,
    load: Load,
    jobs: Iterator[Job],
    bounds: Bounds,
    rng: np.random.Generator,
    place: tuple[int, Advance],
) -> Turn:
    """Send requests as the load says, and read all answers to their ends.

    Args:
        jobs: without end.
        place: the round, and what is told of each request.
    """
    number, advance = place
    records: list[Record] = []

    async def one(job: Job, scheduled: float) -> None:
        record = await client.send(job, scheduled)
        records.append(record)
        advance(record)

    before = await read_counters(client)
    async with watched() as lag:
        started = time.perf_counter()
        end = math.inf if bounds.duration is None else started + bounds.duration
        if load.concurrency is not None:
            await _closed(one, jobs, load.concurrency, bounds, end)
        else:
            await _open(one, jobs, load, bounds, (started, end), rng)
        closed = max((record.ended for record in records), default=started) if math.isinf(end) else end
    records.sort(key=lambda record: record.scheduled)
    after = None if before is None else await read_counters(client)
    counters = None if before is None or after is None else after.since(before)
    return Turn(client.server.label, load, number, tuple(records), started, closed, lag, counters)


async def _closed(one: Send, jobs: Iterator[Job], concurrency: int, bounds: Bounds, end: float) -> None:
    """Each of so many clients sends its next request when it has its answer."""
    left = bounds.requests

    async def client() -> None:
        nonlocal left
        while (now := time.perf_counter()) < end and (left > 0 or bounds.duration is not None):
            left -= 1
            await one(next(jobs), now)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())


async def _open(
    one: Send, jobs: Iterator[Job], load: Load, bounds: Bounds, times: tuple[float, float], rng: np.random.Generator
) -> None:
    """Requests go out at their times, whatever becomes of others."""
    started, end = times
    room = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else None

    async def client(job: Job, due: float) -> None:
        if room is None:
            await one(job, due)
            return
        async with room:
            await one(job, due)

    async with asyncio.TaskGroup() as group:
        for number, offset in enumerate(arrival_times(load, rng)):
            due = started + offset
            if due >= end or (bounds.duration is None and number >= bounds.requests):
                return
            job = next(jobs)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))  # a 0 lets those run that were sent
            group.create_task(client(job, due))
