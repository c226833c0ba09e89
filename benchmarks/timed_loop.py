"""Requests that come by the clock: a loop around an engine that a server's engine process could run.

Whoever has come is let in before each step, and while models draft; what a request waits for is noted until its first
token is there. Nothing is sent anywhere, so times are those of the engine alone.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decoding.messages import EngineStats, TokenEvent
from decoding.request import GenerateRequest


class Clock(Protocol):
    """Seconds that only rise."""

    def __call__(self) -> float: ...

    def idle_until(self, moment: float) -> None:
        """Nothing happens before this moment."""
        ...


class WallClock:
    """The time of day, as it were."""

    def __call__(self) -> float:
        return time.perf_counter()

    def idle_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.perf_counter()))


class CpuClock:
    """The time that this process computes, and the idle time that it only counts.

    What else runs on the machine does not make it go faster; of an engine of several threads it counts each.
    """

    def __init__(self) -> None:
        self._idle = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._idle

    def idle_until(self, moment: float) -> None:
        self._idle += max(0.0, moment - self())


class Served(Protocol):
    """What is asked of an engine; ``decoding.engine.Engine`` is one."""

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: GenerateRequest) -> None: ...

    def step(self, arrivals: Callable[[], None] | None = None) -> list[TokenEvent]: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class First:
    """The way to a request's first token, in seconds."""

    request_id: str
    waited: float  # from the moment when it came until it was let in
    parts: dict[str, float]  # of the steps from then on: see ``EngineStats.part_seconds``
    nodes: int  # drafted nodes that these steps verified
    ttft: float  # all of it

    @property
    def rest(self) -> float:
        """What is in no part."""
        return self.ttft - self.waited - sum(self.parts.values())


@dataclass(frozen=True)
class Pass:
    """What came of some requests."""

    firsts: tuple[First, ...]  # in the order of the requests
    tokens: int
    seconds: float  # from the first arrival to the last token
    texts: tuple[str, ...]  # a digest of each request's tokens


@dataclass
class _Waiting:
    came: float
    let_in: float
    before: EngineStats


@dataclass
class _Loop:
    """A run under way. ``pause``: in a closed loop, seconds from the end of one request to the coming of the next."""

    engine: Served
    requests: Iterator[GenerateRequest]
    clock: Clock
    pause: float | None
    due: list[tuple[float, int, GenerateRequest]] = field(default_factory=list)
    waiting: dict[str, _Waiting] = field(default_factory=dict)
    firsts: dict[str, First] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def send(self, at: float) -> None:
        """The next request comes at this time."""
        request = next(self.requests, None)
        if request is not None:
            heapq.heappush(self.due, (at, len(self.tokens) + len(self.due), request))

    def let_in(self) -> None:
        """Submit whoever has come."""
        while self.due and self.due[0][0] <= (now := self.clock()):
            came, _, request = heapq.heappop(self.due)
            self.waiting[request.request_id] = _Waiting(came, now, self.engine.stats())
            self.tokens[request.request_id] = []
            self.engine.submit(request)

    def step(self) -> None:
        events, now = self.engine.step(self.let_in), self.clock()
        for event in events:
            name = event.request_id
            self.tokens[name].extend(event.token_ids)
            if name in self.waiting and event.token_ids:
                self.firsts[name] = self._first(name, now)
            if event.finish_reason is not None and self.pause is not None:
                self.send(now + self.pause)

    def _first(self, name: str, now: float) -> First:
        known, after = self.waiting.pop(name), self.engine.stats()
        parts = {part: seconds - known.before.part_seconds[part] for part, seconds in after.part_seconds.items()}
        nodes = after.step_nodes - known.before.step_nodes
        return First(name, known.let_in - known.came, parts, nodes, now - known.came)


def closed_loop(engine: Served, requests: Sequence[GenerateRequest], streams: int, pause: float, clock: Clock) -> Pass:
    """Always so many requests in flight; who ends is followed by the next after ``pause`` seconds."""
    loop = _Loop(engine, iter(requests), clock, pause)
    started = clock()
    for _ in range(streams):
        loop.send(started)
    return _run(loop, requests, started)


def open_loop(engine: Served, requests: Sequence[GenerateRequest], times: Sequence[float], clock: Clock) -> Pass:
    """Each request comes at its time, in seconds from now, whatever has become of those before it."""
    loop = _Loop(engine, iter(requests), clock, None)
    started = clock()
    for at in times:
        loop.send(started + at)
    return _run(loop, requests, started)


def _run(loop: _Loop, requests: Sequence[GenerateRequest], started: float) -> Pass:
    while loop.due or loop.engine.has_work:
        loop.let_in()
        if loop.engine.has_work:
            loop.step()
        else:
            loop.clock.idle_until(loop.due[0][0])
    seconds, names = loop.clock() - started, [request.request_id for request in requests]
    return Pass(
        firsts=tuple(loop.firsts[name] for name in names),
        tokens=sum(map(len, loop.tokens.values())),
        seconds=seconds,
        texts=tuple(hashlib.sha256(repr(loop.tokens[name]).encode()).hexdigest()[:16] for name in names),
    )
