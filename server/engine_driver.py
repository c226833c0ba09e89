"""What the engine process and the in-process client share: messages in, steps, messages out."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

from decoding.config import EngineConfig
from decoding.errors import ConfigError, RequestError
from decoding.messages import (
    Cancel,
    EngineInfo,
    EngineStats,
    FromEngine,
    Rejected,
    StepOutput,
    Submit,
    ToEngine,
    TokenEvent,
)
from decoding.request import GenerateRequest

ENGINE = "decoding.engine:Engine"
STATS_SECONDS = 0.25  # between two reports of the counters while the engine works


class SteppedEngine(Protocol):
    """The engine as its loop sees it; ``decoding.engine.Engine`` is the one that serves."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: GenerateRequest) -> None: ...

    def cancel(self, request_id: str, choice: int | None = None) -> list[TokenEvent]: ...

    def step(self, arrivals: Callable[[], None] | None = None) -> list[TokenEvent]:
        """One step.

        Args:
            arrivals: may be called in the middle of it: submits what has come by then.
        """
        ...

    def stats(self) -> EngineStats: ...

    def check_health(self) -> None:
        """Look whether it could step, now and then while it has no work; raises EngineDeadError if not."""
        ...

    def close(self) -> None: ...


@contextmanager
def memory_named() -> Iterator[None]:
    """Running out of memory while an engine loads is a setting that cannot work.

    Raises:
        ConfigError: in place of MemoryError.
    """
    try:
        yield
    except MemoryError as error:
        raise ConfigError(f"there is not enough memory ({error}); lower --kv-cache-memory or --num-pages") from error


def load_engine(target: str, config: EngineConfig) -> SteppedEngine:
    """Load the engine class named ``module:class``; imported here, so that the HTTP process never imports torch.

    Raises:
        ConfigError: the configuration cannot be served.
    """
    module, _, name = target.partition(":")
    engine_class = getattr(importlib.import_module(module), name)
    with memory_named():
        return cast(SteppedEngine, engine_class.load(config))


class EngineDriver:
    """Applies messages to an engine and steps it; one thread calls it.

    Args:
        receive: the next message that is there, None if there is none.
    """

    def __init__(
        self, engine: SteppedEngine, send: Callable[[FromEngine], None], receive: Callable[[], ToEngine | None]
    ) -> None:
        self._engine = engine
        self._send = send
        self._receive = receive
        self._held: deque[ToEngine] = deque()  # came in the middle of a step, and could not be acted on there
        self._last_stats = 0.0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def drain(self) -> bool:
        """Act on every message that is there.

        Returns:
            False after a Shutdown.
        """
        while (message := self._held.popleft() if self._held else self._receive()) is not None:
            if not self.apply(message):
                return False
        return True

    def apply(self, message: ToEngine) -> bool:
        """Act on one message.

        Returns:
            False when it is the last one, a Shutdown.
        """
        if isinstance(message, Submit):
            self._submit(message.request)
        elif isinstance(message, Cancel):
            self._emit(self._engine.cancel(message.request_id, message.choice))
        else:
            return False
        return True

    def step(self) -> None:
        """One step and its one message."""
        self._emit(self._engine.step(self._take_arrivals))

    def report(self) -> None:
        """Send the counters alone."""
        self._send(StepOutput((), self._engine.stats()))

    def _take_arrivals(self) -> None:
        """Submit the requests that have come during a step; what comes behind anything else keeps its place."""
        while (message := self._receive()) is not None:
            if isinstance(message, Submit) and not self._held:
                self._submit(message.request)
            else:
                self._held.append(message)

    def _submit(self, request: GenerateRequest) -> None:
        try:
            self._engine.submit(request)
        except RequestError as error:
            self._send(Rejected(request.request_id, error.message, error.param, error.code))

    def _emit(self, events: list[TokenEvent]) -> None:
        """Send events, with the counters when they are due or the engine comes to rest."""
        now = time.monotonic()
        stats = None
        if now - self._last_stats >= STATS_SECONDS or not self._engine.has_work:
            stats = self._engine.stats()
            self._last_stats = now
        if events or stats is not None:
            self._send(StepOutput(tuple(events), stats))
