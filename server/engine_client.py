"""The HTTP side's view of an engine, and what its forms share.

EngineClient              what routes see
  RoutedEngineClient      base: events that arrive for all requests are routed to each
    SocketEngineClient    one engine process over a Unix socket
    InProcessEngineClient one engine in a thread of this process
  FakeEngineClient        a script, for tests of the HTTP side
  Supervisor              starts clients one after the other, as they die
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

from decoding.errors import EngineDeadError, SaccadeError
from decoding.messages import Cancel, EngineInfo, EngineStats, Ready, Rejected, StepOutput, Submit, ToEngine, TokenEvent
from decoding.request import GenerateRequest
from server.errors import UnavailableError
from server.event_router import EventRouter
from server.limits import Limits

EngineState = Literal["loading", "ready", "restarting", "draining", "dead"]

_WHY_NOT = {
    "loading": "The model is still loading; try again in a moment.",
    "restarting": "The engine is restarting after a failure; try again in a moment.",
    "draining": "The server is shutting down.",
}


class EngineClient(Protocol):
    """An engine as the HTTP process sees it. All methods are called on one event loop."""

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> EngineInfo:
        """What the engine serves.

        Raises:
            UnavailableError: before it has loaded.
        """
        ...

    async def start(self) -> None:
        """Load the model; returns when the first request can come.

        Raises:
            ConfigError: it cannot be loaded; the message names the cause and the fix.
        """
        ...

    async def close(self) -> None:
        """End the engine; requests in flight fail with UnavailableError. Can be called twice."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of all choices, until each had its terminal one.

        Events of a choice that piled up behind a slow consumer come merged into one. Closing the generator early
        cancels the request.

        Raises:
            RequestError: the request cannot be served.
            UnavailableError: no engine can take it now.
            EngineDeadError: the engine ended on the way.
        """
        ...

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it; a "cancelled" event follows. Never blocks; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """The engine's latest counters, at most a fraction of a second old."""
        ...

    @property
    def restarts(self) -> int:
        """How often an engine was started in place of one that had ended."""
        ...

    @property
    def pid(self) -> int | None:
        """Of the engine's own process; None: it has none, or none now."""
        ...

    async def wait_dead(self) -> None:
        """Wait until the engine has ended for good."""
        ...


def check_ready(state: EngineState) -> None:
    """Let a request pass only when an engine can take it.

    Raises:
        UnavailableError: not now.
        EngineDeadError: not any more.
    """
    if state == "dead":
        raise EngineDeadError("The engine has ended; the server must be restarted.")
    if state != "ready":
        code = "draining" if state == "draining" else "server_is_overloaded"
        raise UnavailableError(_WHY_NOT[state], code=code)


class RoutedEngineClient(ABC):
    """A client whose engine answers all requests on one channel."""

    def __init__(self, max_pending: int = Limits.max_pending_tokens) -> None:
        self._state: EngineState = "loading"
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._router = EventRouter(max_pending)
        self._heard = 0  # messages from the engine: a watchdog sees by it whether there was one
        self._loaded = asyncio.Event()
        self._dead = asyncio.Event()

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise UnavailableError(_WHY_NOT["loading"])
        return self._info

    def stats(self) -> EngineStats:
        return self._stats

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        if self._state == "ready":
            self._send(Cancel(request_id, choice))

    @property
    def restarts(self) -> int:
        return 0  # it is started once

    @property
    def pid(self) -> int | None:
        return None

    async def wait_dead(self) -> None:
        await self._dead.wait()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        check_ready(self._state)
        stream = self._router.open(request)
        try:
            self._send(Submit(request))
            while not stream.drained:
                for event in await stream.take():
                    yield event
        finally:
            self._router.close(request.request_id)
            if not stream.ended:
                self.cancel(request.request_id)

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Hand a message to the engine without blocking."""

    def _receive(self, message: Ready | StepOutput | Rejected) -> None:
        self._heard += 1
        if isinstance(message, StepOutput):
            for request_id in self._router.dispatch(message.events):
                self.cancel(request_id)
            if message.stats is not None:
                self._stats = message.stats
        elif isinstance(message, Rejected):
            self._router.reject(message)
        elif self._state == "loading":  # an engine can be dead by the time that its Ready is read
            self._info = message.info
            self._state = "ready"
            self._loaded.set()

    async def _wait_loaded(self) -> None:
        """Wait until the engine is ready, or has ended before that."""
        await self._loaded.wait()

    def _die(self, reason: str) -> None:
        """The engine has ended: fail every request in flight, and take no more."""
        self._end(lambda: EngineDeadError(reason))

    def _close_down(self) -> None:
        """The engine is being ended: as ``_die``, with another reason."""
        self._end(lambda: UnavailableError("The server shut down before the request was finished.", code="draining"))

    def _end(self, make_error: Callable[[], SaccadeError]) -> None:
        self._state = "dead"
        self._router.fail_all(make_error)
        self._loaded.set()
        self._dead.set()
