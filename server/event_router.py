"""From one channel of events to a stream for each request.

A stream holds what its consumer has not taken yet, up to a limit: the engine does not wait for a client that reads
slowly, so what a client leaves unread is memory. A stream over its limit fails, and its request is cancelled. Events
that pile up are merged by choice when they are taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from decoding.errors import RequestError, SaccadeError
from decoding.messages import Rejected, TokenEvent
from decoding.request import GenerateRequest
from server.errors import SlowReaderError
from server.limits import Limits


class EventStream:
    """The events of one request; put on and taken from one event loop."""

    def __init__(self, choices: int, max_pending: int) -> None:
        self._pending: list[TokenEvent] = []
        self._weight = 0  # of what is pending: tokens, and alternatives with a logprob
        self._max_weight = max_pending
        self._open = set(range(choices))
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Nothing more will be put: each choice had its terminal event, or the stream failed."""
        return not self._open or self._error is not None

    @property
    def drained(self) -> bool:
        """Every event was taken, the terminal ones included; never true of a stream that failed."""
        return not self._open and not self._pending

    def put(self, event: TokenEvent) -> bool:
        """Add an event; one for a choice that has ended already is dropped.

        Returns:
            False when the stream has just failed because too much is pending.
        """
        if event.choice not in self._open or self._error is not None:
            return True
        self._weight += _weight(event)
        if self._weight > self._max_weight:
            self._pending.clear()
            self.fail(
                SlowReaderError("The answer was not read fast enough: too much of it waited, and it was cancelled.")
            )
            return False
        if event.finish_reason is not None:
            self._open.discard(event.choice)
        self._pending.append(event)
        self._wake()
        return True

    def fail(self, error: Exception) -> None:
        """End the stream with an error, unless all choices have ended already."""
        if self._open and self._error is None:
            self._error = error
            self._wake()

    async def take(self) -> list[TokenEvent]:
        """Wait for events and take all of them, one a choice.

        Raises:
            SaccadeError: what the stream failed with, after the events before it.
        """
        if not self._pending and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._pending and self._error is not None:
            raise self._error
        events, self._pending, self._weight = self._pending, [], 0
        return merge_by_choice(events)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventRouter:
    """Knows the stream of each request in flight.

    Args:
        max_pending: tokens of one request that may wait for its consumer; an alternative with a logprob counts as one.
    """

    def __init__(self, max_pending: int = Limits.max_pending_tokens) -> None:
        self._max_pending = max_pending
        self._streams: dict[str, EventStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request: GenerateRequest) -> EventStream:
        """The stream of a new request.

        Raises:
            RequestError: a request of that id is in flight.
        """
        if request.request_id in self._streams:
            raise RequestError(f"a request called {request.request_id!r} is in flight", param="request_id")
        stream = self._streams[request.request_id] = EventStream(request.params.n, self._max_pending)
        return stream

    def close(self, request_id: str) -> None:
        """Forget a request; events that still come for it are dropped."""
        self._streams.pop(request_id, None)

    def dispatch(self, events: Iterable[TokenEvent]) -> list[str]:
        """Put each event on its stream.

        Returns:
            the requests whose streams have failed by that: the engine is to end them.
        """
        failed = []
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None and not stream.put(event):
                failed.append(event.request_id)
        return failed

    def reject(self, rejected: Rejected) -> None:
        stream = self._streams.get(rejected.request_id)
        if stream is not None:
            stream.fail(RequestError(rejected.message, param=rejected.param, code=rejected.code))

    def fail_all(self, make_error: Callable[[], SaccadeError]) -> None:
        """Fail every request, each with an error of its own."""
        for stream in self._streams.values():
            stream.fail(make_error())


def _weight(event: TokenEvent) -> int:
    if event.logprobs is None:
        return len(event.token_ids)
    return sum(1 + len(scored.top) for scored in event.logprobs)


def merge_by_choice(events: list[TokenEvent]) -> list[TokenEvent]:
    """One event a choice, in the order of each choice's first one."""
    if len(events) == 1:
        return events
    by_choice: dict[int, list[TokenEvent]] = {}
    for event in events:
        by_choice.setdefault(event.choice, []).append(event)
    return [group[0] if len(group) == 1 else _merge(group) for group in by_choice.values()]


def _merge(events: list[TokenEvent]) -> TokenEvent:
    first, last = events[0], events[-1]
    scored = any(event.logprobs is not None for event in events)
    return replace(
        last,
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(entry for event in events for entry in event.logprobs or ()) if scored else None,
        seed=first.seed,
        cached_tokens=first.cached_tokens,
        queued_seconds=first.queued_seconds,
        prompt_logprobs=first.prompt_logprobs,
        trace=tuple(step for event in events for step in event.trace),
    )
