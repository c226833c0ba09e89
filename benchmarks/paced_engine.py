"""An engine without a model that makes events on the beat of a clock: what is measured is the HTTP process alone.

It runs in an ordinary engine process (``server.engine_process``) and speaks to the HTTP process over the same socket
and in the same messages as the engine that serves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from decoding.config import EngineConfig
from decoding.messages import EngineInfo, EngineStats, FinishReason, SpeculationStats, TokenEvent
from decoding.request import GenerateRequest

ENGINE = "benchmarks.paced_engine:PacedEngine"
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class Pace:
    """What the engine is told, as JSON in the place of a model's name."""

    rows: int  # it begins when so many requests are there, and each step has an event of each
    tokens: int  # of one event
    rate: float  # tokens a second of all rows together; 0: as fast as it can
    token_id: int  # which all tokens are
    core: int  # that it runs on
    log: str  # file for the times of its steps: nanoseconds of the monotonic clock, in JSON

    def config(self) -> EngineConfig:
        return EngineConfig(msgspec.json.encode(self).decode())


class PacedEngine:
    """Implements SteppedEngine for one batch of requests of equal length."""

    def __init__(self, pace: Pace) -> None:
        self.info = EngineInfo("paced", MAX_TOKENS, MAX_TOKENS, (0,), (), "none", "cpu")
        self._pace = pace
        self._seconds = pace.rows * pace.tokens / pace.rate if pace.rate else 0.0  # of a step
        self._left: dict[str, int] = {}  # events still to come, of each request
        self._begun: float | None = None
        self._times: list[int] = []

    @classmethod
    def load(cls, config: EngineConfig) -> PacedEngine:
        pace = msgspec.json.decode(config.model, type=Pace)
        os.sched_setaffinity(0, {pace.core})
        return cls(pace)

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def submit(self, request: GenerateRequest) -> None:
        self._left[request.request_id] = request.params.max_tokens // self._pace.tokens

    def cancel(self, request_id: str, choice: int | None = None) -> list[TokenEvent]:
        if self._left.pop(request_id, None) is None:
            return []
        return [TokenEvent(request_id, 0, finish_reason="cancelled")]

    def step(self, arrivals: Callable[[], None] | None = None) -> list[TokenEvent]:
        if self._begun is None and len(self._left) < self._pace.rows:
            time.sleep(0.001)
            return []
        self._wait()
        events = [self._event(request_id) for request_id in self._left]
        self._left = {request_id: left - 1 for request_id, left in self._left.items() if left > 1}
        self._times.append(time.monotonic_ns())
        if not self._left:
            Path(self._pace.log).write_bytes(msgspec.json.encode(self._times))
        return events

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._left), steps=len(self._times), pages_total=1, pages_free=1)

    def check_health(self) -> None:
        """It needs nobody else."""

    def close(self) -> None:
        self._left.clear()

    def _wait(self) -> None:
        """Until this step's time has come; a late one does not delay those after it."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now
        time.sleep(max(self._begun + len(self._times) * self._seconds - now, 0.0))

    def _event(self, request_id: str) -> TokenEvent:
        last = self._left[request_id] == 1
        reason: FinishReason | None = "length" if last else None
        stats = SpeculationStats(steps=len(self._times) + 1) if last else None
        tokens = (self._pace.token_id,) * self._pace.tokens
        return TokenEvent(request_id, 0, tokens, finish_reason=reason, speculation=stats)
