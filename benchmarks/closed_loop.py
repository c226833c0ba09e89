"""A closed loop: always the same number of requests in flight, each replaced as soon as it ends.

What is timed is a window of that loop. It opens when every row has made its first token, and it closes when a given
number of tokens has come out: all systems then do the same work on the same texts (a text does not depend on who
drafts), none of them is measured while rows are missing, and at concurrency 1 the tokens are the very same. The first
requests are shorter by steps, so that requests end, and new ones begin, evenly over time and not all at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.measure import Case
from decoding.messages import EngineStats, TokenEvent
from decoding.request import GenerateRequest, SamplingParams

Clock = Callable[[], float]


class Steps(Protocol):
    """What is asked of an engine; ``decoding.engine.Engine`` is one."""

    def submit(self, request: GenerateRequest) -> None: ...

    def step(self) -> list[TokenEvent]: ...

    def cancel(self, request_id: str) -> list[TokenEvent]: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class Load:
    """What is kept in flight, and how long."""

    concurrency: int
    temperature: float
    tokens: int  # of each request
    window: int  # tokens, all rows together, that are timed
    limit: float  # seconds after which the window closes all the same, if anything came out
    first: int = 0  # the case that the first request takes; the others follow in order, round and round


@dataclass(frozen=True)
class Window:
    """What came out of a window."""

    tokens: int
    seconds: float
    steps: int
    forward_seconds: float
    draft_seconds: float
    drafted: int
    accepted: int
    by_drafter: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def run_loop(engine: Steps, cases: Sequence[Case], load: Load, clock: Clock = time.perf_counter) -> Window:
    """Run the loop until its window closes; requests that are still in flight then are cancelled.

    Raises:
        RequestError: a prompt that does not fit the model.
    """
    flight = _Flight(engine, _requests(cases, load))
    for _ in range(load.concurrency):
        flight.launch()
    first = set(flight.running)
    while first:  # until each has made a token
        first -= {event.request_id for event in flight.step()}
    before, started, tokens = engine.stats(), clock(), 0
    while tokens < load.window and (not tokens or clock() - started < load.limit):
        tokens += sum(len(event.token_ids) for event in flight.step())
    seconds, after = clock() - started, engine.stats()
    flight.land()
    return _window(tokens, seconds, before, after)


def _requests(cases: Sequence[Case], load: Load) -> Iterator[GenerateRequest]:
    number = 0
    while True:
        case = cases[(load.first + number) % len(cases)]
        tokens = load.tokens
        if number < load.concurrency:  # of the first ones, the last is the whole length
            tokens = max(1, load.tokens * (number + 1) // load.concurrency)
        params = SamplingParams(max_tokens=tokens, temperature=load.temperature, seed=case.seed, ignore_eos=True)
        yield GenerateRequest(f"loop-{number}", case.ids, params)
        number += 1


class _Flight:
    """The requests that run."""

    def __init__(self, engine: Steps, requests: Iterator[GenerateRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self.running: set[str] = set()

    def launch(self) -> None:
        request = next(self._requests)
        self._engine.submit(request)
        self.running.add(request.request_id)

    def step(self) -> list[TokenEvent]:
        events = self._engine.step()
        for event in events:
            if event.finish_reason is not None:
                self.running.remove(event.request_id)
                self.launch()
        return events

    def land(self) -> None:
        for request_id in self.running:
            self._engine.cancel(request_id)
        self.running.clear()


def _window(tokens: int, seconds: float, before: EngineStats, after: EngineStats) -> Window:
    by_drafter = {}
    for name, count in after.by_drafter.items():
        old = before.by_drafter.get(name)
        by_drafter[name] = {
            "drafted": count.drafted - (old.drafted if old else 0),
            "accepted": count.accepted - (old.accepted if old else 0),
        }
    return Window(
        tokens=tokens,
        seconds=seconds,
        steps=after.steps - before.steps,
        forward_seconds=after.forward_seconds - before.forward_seconds,
        draft_seconds=after.draft_seconds - before.draft_seconds,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        by_drafter=by_drafter,
    )
