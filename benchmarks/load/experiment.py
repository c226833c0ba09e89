"""The order of a measurement: loads one after the other, each in rounds, in each round every server's turn.

Two servers take turns on the same prompts, at the same times and with the same seeds, and who begins changes from round
to round: a machine that is slower for a while is slower for both, and how much rounds differ is known, not guessed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from benchmarks.load.client import Job, LoadClient, prepare
from benchmarks.load.greeting import greet
from benchmarks.load.loops import Advance, Bounds, Turn, run_turn
from benchmarks.load.prompts import Prompt
from benchmarks.load.records import Record
from benchmarks.load.settings import Extent, Load, Sampling, Server


@dataclass(frozen=True)
class Plan:
    """All that is to be done."""

    servers: tuple[Server, ...]
    loads: tuple[Load, ...]
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    extent: Extent

    def bounds(self, number: int) -> Bounds:
        """Of a round's turns: the requests and seconds are spread over the rounds."""
        rounds, requests = self.extent.rounds, self.extent.requests
        share = requests // rounds + (number < requests % rounds)
        return Bounds(share, None if self.extent.duration is None else self.extent.duration / rounds)


@dataclass(frozen=True)
class Measured:
    """What came out; ``servers`` with what was found out about them."""

    servers: tuple[Server, ...]
    turns: tuple[Turn, ...]


async def measure(plan: Plan, progress: bool | None = None) -> Measured:
    """Do it.

    Args:
        progress: show a bar; None: on a terminal.

    Raises:
        NoServerError: nobody answers.
        ConfigError: a server that refuses a first request.
    """
    timeout = plan.extent.timeout
    greeted = [await greet(server, plan.sampling, plan.prompts[0], timeout) for server in plan.servers]
    servers = tuple(server for server, _ in greeted)
    async with contextlib.AsyncExitStack() as stack:
        connections = _most([load.connections for load in plan.loads])
        clients = [
            await stack.enter_async_context(LoadClient(each, connections, timeout, plan.extent.keep_alive))
            for each in servers
        ]
        for client in clients:
            await _warm_up(client, plan)
        turns: list[Turn] = []
        with _bar(plan, progress) as advance:
            first = plan.extent.warm_ups
            for place, load in enumerate(plan.loads):
                done = [turn async for turn in _rounds(clients, plan, (place, first), load, advance)]
                first += sum(_most_records(done, number) for number in range(plan.extent.rounds))
                turns += done
    return Measured(servers, tuple(turns))


def _most(connections: Sequence[int | None]) -> int | None:
    known = [each for each in connections if each is not None]
    return max(known) if len(known) == len(connections) else None


async def _warm_up(client: LoadClient, plan: Plan) -> None:
    """Requests that nothing is measured of; the first one was the greeting."""
    load = Load(concurrency=max(1, min(plan.extent.warm_ups, max((each.concurrency or 1) for each in plan.loads))))
    if plan.extent.warm_ups > 1:
        bounds = Bounds(plan.extent.warm_ups - 1)
        await run_turn(client, load, _jobs(client, plan, 0), bounds, np.random.default_rng(0), (0, lambda _: None))


async def _rounds(
    clients: Sequence[LoadClient], plan: Plan, where: tuple[int, int], load: Load, advance: Advance
) -> AsyncIterator[Turn]:
    """
    Args:
        where: the load's place in the sweep, and its first prompt.
    """
    place, first = where
    for number in range(plan.extent.rounds):
        order = clients if number % 2 == 0 else clients[::-1]
        done = []
        for client in order:
            rng = np.random.default_rng([plan.sampling.seed, place, number])
            turn = await run_turn(client, load, _jobs(client, plan, first), plan.bounds(number), rng, (number, advance))
            done.append(turn)
            yield turn
        first += _most_records(done, number)


def _most_records(turns: Sequence[Turn], number: int) -> int:
    """Of a server in a round; within a given time one may get further than the other."""
    return max(len(turn.records) for turn in turns if turn.round == number)


def _jobs(client: LoadClient, plan: Plan, first: int) -> Iterator[Job]:
    """Prompts from the ``first`` on, round and round."""
    number = first
    while True:
        index = number % len(plan.prompts)
        yield prepare(client.server, plan.sampling, index, plan.prompts[index])
        number += 1


@contextlib.contextmanager
def _bar(plan: Plan, progress: bool | None) -> Iterator[Advance]:
    total = None
    if plan.extent.duration is None:
        total = plan.extent.requests * len(plan.loads) * len(plan.servers)
    hidden = None if progress is None else not progress
    with tqdm(total=total, desc="requests", unit="req", disable=hidden, mininterval=0.5, maxinterval=math.inf) as bar:
        failed = 0

        def advance(record: Record) -> None:
            nonlocal failed
            if record.error is not None:
                failed += 1
                bar.set_postfix(failed=failed, refresh=False)
            bar.update()

        yield advance
