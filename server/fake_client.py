"""An EngineClient that follows a script: the HTTP side's tests run on it, without a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, replace

from decoding.errors import EngineDeadError
from decoding.messages import EngineInfo, EngineStats, SpeculationStats, TokenEvent
from decoding.request import GenerateRequest
from server.engine_client import EngineState, check_ready
from server.errors import UnavailableError


@dataclass(frozen=True)
class Pause:
    """A time in which the scripted engine says nothing."""

    seconds: float


@dataclass(frozen=True)
class Death:
    """The scripted engine ends here, for all requests."""


Line = TokenEvent | Pause | Death
Script = Callable[[GenerateRequest], Iterable[Line]]


def echo_script(request: GenerateRequest) -> Iterable[Line]:
    """Every choice repeats the prompt, a token a step, up to max_tokens."""
    prompt, params = request.prompt_ids, request.params
    for position in range(params.max_tokens):
        last = position == params.max_tokens - 1
        for choice in range(params.n):
            yield TokenEvent(
                request.request_id,
                choice,
                (prompt[position % len(prompt)],),
                finish_reason="length" if last else None,
                seed=params.seed if position == 0 else None,
                speculation=SpeculationStats(steps=params.max_tokens) if last else None,
            )


class FakeEngineClient:
    """Plays a script for each request.

    Attributes:
        requests: those that came, in order.
        cancelled: (request id, choice) of each call of ``cancel``, and of each request whose consumer left.
    """

    def __init__(self, info: EngineInfo, script: Script = echo_script, *, state: EngineState = "ready") -> None:
        self._info = info
        self._script = script
        self._state: EngineState = state
        self._dead = asyncio.Event()
        self._cuts: dict[str, set[int | None]] = {}  # choices cancelled, of each request in flight
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[tuple[str, int | None]] = []

    @property
    def state(self) -> EngineState:
        return self._state

    @state.setter
    def state(self, state: EngineState) -> None:
        self._state = state

    @property
    def info(self) -> EngineInfo:
        if self._state == "loading":
            raise UnavailableError("The model is still loading.")
        return self._info

    async def start(self) -> None:
        self._state = "ready"

    async def close(self) -> None:
        self.die()

    def die(self) -> None:
        """End, as an engine does that crashes: each request in flight fails when its script goes on."""
        self._state = "dead"
        self._dead.set()

    @property
    def restarts(self) -> int:
        return 0

    @property
    def pid(self) -> int | None:
        return None

    async def wait_dead(self) -> None:
        await self._dead.wait()

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self.cancelled.append((request_id, choice))
        if request_id in self._cuts:
            self._cuts[request_id].add(choice)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._cuts), pages_total=100, pages_free=100 - len(self._cuts))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        check_ready(self._state)
        request.validate(self._info.vocab_size, self._info.max_model_len, self._info.drafters)
        self.requests.append(request)
        self._cuts[request.request_id] = set()
        open_choices = set(range(request.params.n))
        try:
            for line in self._script(request):
                if isinstance(line, Death):
                    self.die()
                elif isinstance(line, Pause):
                    await self._pause(line.seconds)
                if self._state == "dead":
                    raise EngineDeadError("The engine ended; the request was not finished and can be sent again.")
                if isinstance(line, TokenEvent) and line.choice in open_choices:
                    event = self._or_cancelled(line)
                    if event.finish_reason is not None:
                        open_choices.discard(line.choice)
                    yield event
        finally:
            del self._cuts[request.request_id]
            if open_choices:
                self.cancel(request.request_id)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds  # not by the event: each request of a test may have a loop of its own
        while self._state != "dead" and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.01))

    def _or_cancelled(self, event: TokenEvent) -> TokenEvent:
        """The event, or the terminal one that a cancelled choice gets in its place."""
        if not self._cuts[event.request_id] & {None, event.choice}:
            return event
        return replace(event, token_ids=(), logprobs=None, finish_reason="cancelled", stop_token=None)
