"""Server-sent events, and noticing that the client has left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from decoding.errors import SaccadeError
from server.errors import deadline_exceeded, keep_error, reply_to

PING_SECONDS = 10.0  # proxies close connections that are silent for 60 s
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def to_json(value: Any) -> str:
    """Compact JSON in ASCII: U+2028 and U+0085 end a line for many clients of event streams."""
    return _ENCODER.encode(value)


def event_bytes(payload: dict[str, Any]) -> bytes:
    """One event."""
    return f"data: {to_json(payload)}\n\n".encode("ascii")


def error_event(error: Exception) -> bytes:
    """An error in the middle of a stream."""
    return event_bytes(reply_to(error).body())


class EventStreamResponse(Response):
    """Sends events, ``[DONE]`` at the end, and comments while there is nothing to send.

    The status goes out with the first event, so that an error before it is an ordinary error response (unless a
    comment had to go out first). A later error becomes an event. When the client leaves, ``events`` is closed.

    Args:
        events: bytes of whole events, one or several at a time.
        ping_seconds: of silence before a comment.
        remaining: seconds to the deadline, None without one; raises LateError when it has passed.
        last: what stands behind the last event.
        failed: makes an error's events.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        ping_seconds: float = PING_SECONDS,
        remaining: Callable[[], float | None] = lambda: None,
        last: bytes = DONE,
        failed: Callable[[Exception], bytes] = error_event,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._ping_seconds = ping_seconds
        self._remaining = remaining
        self._last = last
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(send, self.status_code, self.raw_headers)
        pump = asyncio.create_task(self._pump(sender, scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        ping = asyncio.create_task(self._ping(sender))
        try:
            done, _ = await asyncio.wait({pump, gone}, timeout=self._remaining(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end([gone, ping])
            if not pump.done():
                await _end([pump])
        if not done:
            await self._fail(sender, deadline_exceeded(), scope, receive, send)
        elif not pump.cancelled():
            pump.result()

    async def _pump(self, sender: _Sender, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await sender.send(event)
            await sender.send(self._last, more=False)
        except Exception as error:
            await self._fail(sender, error, scope, receive, send)
            if not isinstance(error, SaccadeError):
                raise  # to the log, and to a response if there was none

    async def _fail(self, sender: _Sender, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        keep_error(scope, reply_to(error))
        if sender.started:
            await sender.send(self._failed(error))
            await sender.send(self._last, more=False)
        elif isinstance(error, SaccadeError):
            await reply_to(error).response()(scope, receive, send)

    async def _ping(self, sender: _Sender) -> None:
        while True:
            await asyncio.sleep(max(sender.last_sent + self._ping_seconds - time.monotonic(), 0.05))
            if not sender.busy and time.monotonic() - sender.last_sent >= self._ping_seconds:
                await sender.send(PING)


class _Sender:
    """Sends pieces of the body, the response's start before the first."""

    def __init__(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._start: Message = {"type": "http.response.start", "status": status, "headers": headers}
        self.started = False
        self.busy = False  # a send waits for a slow client
        self.last_sent = time.monotonic()

    async def send(self, data: bytes, more: bool = True) -> None:
        self.busy = True
        if not self.started:
            self.started = True
            await self._send(self._start)
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.last_sent = time.monotonic()
        self.busy = False


async def until_disconnect(
    request: Request, answer: Coroutine[Any, Any, Response], seconds: float | None = None
) -> Response:
    """The answer; when the client leaves first, ``answer`` is cancelled, and nobody reads the response (status 499).

    A plain handler would run to its end after the client has left.

    Args:
        seconds: in which the answer must be there.

    Raises:
        LateError: it was not.
    """
    work = asyncio.create_task(answer)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise deadline_exceeded()
        return work.result() if work.done() else Response(status_code=499)
    finally:
        await _end([work, gone])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
