"""Who may send a request and whether there is room for it: asked once for each request, before it costs anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from decoding.errors import RequestError
from server.auth import ApiKeys
from server.body_memory import HeldBody
from server.errors import OverloadedError, deadline_exceeded
from server.limits import Limits
from server.pace import Pace

TIMEOUT_HEADER = "x-request-timeout"
_TICKET = "ticket"


class Ticket:
    """What an admitted request has: until when it is to be answered, whose it is, and its share of the room."""

    def __init__(self, room: Room, deadline: float | None = None, key_name: str = "") -> None:
        self._room = room
        self._choices = 0
        self._body: HeldBody | None = None
        self.deadline = deadline  # of time.monotonic()
        self.key_name = key_name

    def hold(self, body: HeldBody) -> None:
        """Count the request's body until its prompts are token ids, or the request ends."""
        self._free_body()
        self._body = body

    def queue(self, choices: int) -> None:
        """Take places for choices in the batch or its queue; they are held until the answer has been sent.

        Prompts are token ids by then: the body's share of the memory is given back.

        Raises:
            OverloadedError: the queue is full.
            LateError: the deadline has passed already.
        """
        self._free_body()
        self.remaining()
        self._room.take(choices)
        self._choices += choices

    def remaining(self) -> float | None:
        """Seconds to the deadline; None where there is none.

        Raises:
            LateError: it has passed.
        """
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        if left <= 0.0:
            raise deadline_exceeded()
        return left

    def give_back(self) -> None:
        """The answer has been sent."""
        self._free_body()
        self._room.free(self._choices)
        self._choices = 0

    def _free_body(self) -> None:
        if self._body is not None:
            self._body.free()
            self._body = None


class Admission(Protocol):
    """Decides over requests. What it returns is held until the answer has been sent."""

    def admit(self, scope: Scope) -> AbstractContextManager[Ticket]:
        """Let a request in.

        Raises:
            SaccadeError: it may not come in; ``server.errors.reply_to`` must know how to say so.
        """
        ...


class Room:
    """Places for choices: a full batch and a full queue.

    It is counted here, since what the engine reports is up to a quarter of a second old. A request comes in as long as
    the queue is not full, however many choices it has: one that is larger than what is left would else never come in.
    """

    def __init__(self, rows: int, queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows = rows
        self._size = rows + queue
        self._taken = 0
        self._pace = Pace(clock)

    @property
    def full(self) -> bool:
        return self._taken >= self._size

    def retry_after(self) -> float:
        """Seconds until half of what waits now has its place, at the pace at which choices end."""
        return self._pace.seconds_for(max(self._taken - self._rows, 0) / 2)

    def take(self, choices: int) -> None:
        """Raises OverloadedError when the queue is full."""
        if self.full:
            raise OverloadedError(
                "The server is overloaded: its queue is full. Try again later.",
                limit="max_queued_requests",
                retry_after=self.retry_after(),
            )
        self._taken += choices

    def free(self, choices: int) -> None:
        """Give places back; ones of a request that never queued are none."""
        if choices == 0:
            return
        self._pace.ended(choices, busy=self._taken > self._rows)
        self._taken -= choices


class Guard:
    """The admission of a served application: headers, key, requests at once, deadline."""

    def __init__(self, limits: Limits, keys: ApiKeys, rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._keys = keys
        self.room = Room(rows, limits.max_queued_requests, clock)
        most = limits.max_concurrent_requests
        self._most = rows + limits.max_queued_requests if most is None else most
        self._requests = 0

    @property
    def full(self) -> bool:
        """Whether the next request that needs the engine would be turned away."""
        return self.room.full or self._requests >= self._most

    def admit(self, scope: Scope) -> AbstractContextManager[Ticket]:
        self._check_headers(scope)
        key_name = self._keys.check(scope)
        ticket = Ticket(self.room, self._deadline(scope), key_name)
        if scope["method"] == "POST" and self._requests >= self._most:
            raise OverloadedError(
                f"The server is overloaded: it answers {self._most} requests already. Try again later.",
                limit="max_concurrent_requests",
                retry_after=self.room.retry_after(),
            )
        return self._hold(ticket, 1 if scope["method"] == "POST" else 0)

    @contextmanager
    def _hold(self, ticket: Ticket, requests: int) -> Iterator[Ticket]:
        self._requests += requests
        try:
            yield ticket
        finally:
            self._requests -= requests
            ticket.give_back()

    def _check_headers(self, scope: Scope) -> None:
        """The parser gives out headers that came in one piece, however many and large they are."""
        headers, limits = scope["headers"], self._limits
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        if size > limits.max_header_size or len(headers) > limits.max_header_count:
            raise RequestError(
                f"The request's headers are too large; this server takes {limits.max_header_size} bytes and "
                f"{limits.max_header_count} headers.",
                code="headers_too_large",
            )

    def _deadline(self, scope: Scope) -> float | None:
        """The server's, or the client's where that is earlier."""
        seconds = self._limits.request_timeout
        asked = Headers(scope=scope).get(TIMEOUT_HEADER)
        if asked is not None:
            seconds = min(_seconds(asked), math.inf if seconds is None else seconds)
        return None if seconds is None else time.monotonic() + seconds


def ticket_of(request: Request) -> Ticket:
    """The ticket that the middleware got for a request."""
    return cast(Ticket, request.scope["state"][_TICKET])


def keep_ticket(scope: Scope, ticket: Ticket) -> None:
    """Where ``ticket_of`` finds it."""
    scope.setdefault("state", {})[_TICKET] = ticket


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:  # false for nan
        raise RequestError(
            f"The header {TIMEOUT_HEADER} must be a number of seconds above 0, such as 2.5.", param=TIMEOUT_HEADER
        )
    return seconds
