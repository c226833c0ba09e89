"""Keeps an engine running: starts a new one when it dies, and gives up on one that is of no use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from decoding.errors import ConfigError
from decoding.messages import EngineInfo, EngineStats, TokenEvent
from decoding.request import GenerateRequest
from server.engine_client import EngineClient, EngineState, check_ready

log = logging.getLogger("saccade")


@dataclass(frozen=True)
class RestartPolicy:
    """When to start an engine again, in seconds.

    A life is useless if the engine did not start, or had requests and died young without a token for any of them.
    Whoever kills engines that work, or that have nothing to do, can do so forever: there will be another one.
    """

    first_delay: float = 0.5  # doubled with each useless life
    longest_delay: float = 16.0
    short_life: float = 60.0  # an engine that lived longer was of use
    max_useless_lives: int = 8  # after more in a row the supervisor gives up

    def delay(self, useless_lives: int) -> float:
        return min(self.first_delay * 2.0 ** max(useless_lives - 1, 0), self.longest_delay)


class Supervisor:
    """An EngineClient made of one client after another.

    Args:
        make_client: makes a client that was never started.
    """

    def __init__(self, make_client: Callable[[], EngineClient], policy: RestartPolicy = RestartPolicy()) -> None:
        self._make_client = make_client
        self._policy = policy
        self._client = make_client()
        self._state: EngineState = "loading"
        self._info: EngineInfo | None = None
        self._in_flight = 0
        self._restarts = 0
        self._asked = self._answered = False  # the engine that runs: for anything, with any token
        self._watcher: asyncio.Task[None] | None = None

    @property
    def state(self) -> EngineState:
        # between an engine's death and the watcher's next turn the client knows better
        if self._state == "ready" and self._client.state != "ready":
            return "restarting"
        return self._state

    @property
    def info(self) -> EngineInfo:
        return self._info or self._client.info

    @property
    def restarts(self) -> int:
        """How often an engine was started again."""
        return self._restarts

    @property
    def pid(self) -> int | None:
        """Of the engine that runs now."""
        return self._client.pid

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return self._in_flight

    async def start(self) -> None:
        await self._client.start()
        self._info = self._client.info
        self._set_unless_draining("ready")
        self._watcher = asyncio.create_task(self._watch())

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and give those in flight so long to end by themselves."""
        self._state = "draining"
        until = time.monotonic() + seconds
        while self._in_flight and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        if self._state != "dead":
            self._state = "draining"
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._client.close()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        check_ready(self.state)
        self._in_flight += 1
        self._asked = True
        try:
            async with aclosing(self._client.generate(request)) as events:
                async for event in events:
                    self._answered = True
                    yield event
        finally:
            self._in_flight -= 1

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self._client.cancel(request_id, choice)

    def stats(self) -> EngineStats:
        return self._client.stats()

    async def wait_dead(self) -> None:
        """Wait until the supervisor itself has given up."""
        if self._watcher is not None:
            await asyncio.wait([self._watcher])

    async def _watch(self) -> None:
        useless = 0  # lives in a row
        while True:
            started = time.monotonic()
            await self._client.wait_dead()
            lived = time.monotonic() - started
            if self._answered or lived > self._policy.short_life:
                useless = 0
            elif self._asked:
                useless += 1
            log.error("the engine ended after %.0f s", lived)
            await self._client.close()
            while useless <= self._policy.max_useless_lives and not await self._restart(useless):
                useless += 1
            if useless > self._policy.max_useless_lives:
                self._state = "dead"
                log.error("gave up on the engine after %d useless lives in a row; restart the server", useless)
                return

    async def _restart(self, useless_lives: int) -> bool:
        self._set_unless_draining("restarting")
        await asyncio.sleep(self._policy.delay(useless_lives))
        self._client = self._make_client()
        try:
            await self._client.start()
        except (ConfigError, OSError) as error:
            log.error("the engine did not start again: %s", error)
            await self._client.close()  # of one that could not even be started the socket is open
            return False
        self._restarts += 1
        self._asked = self._answered = False
        self._info = self._client.info
        self._set_unless_draining("ready")
        log.info("the engine runs again")
        return True

    def _set_unless_draining(self, state: EngineState) -> None:
        if self._state != "draining":
            self._state = state
