"""uvicorn's HTTP protocol with an end to whatever a client may take its time for.

By itself uvicorn waits forever for the rest of a head or a body and for a client that does not read, takes heads and
trailers of any size (and trailers for headers), answers what is no HTTP in plain text, and HTTP/1.0 in chunks. The time
of a body that the application reads is the application's (``server.middleware``), so that its error is an ordinary
response.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.close_delimited import close_delimited
from server.errors import ErrorReply, OverloadedError, reply_to
from server.limits import Limits
from server.middleware import new_id

LINGER_SECONDS = 1.0  # in which a refused client may still send, and so gets to read its answer

# At an offer of another protocol the parser stops, and what follows is lost: the body, and all requests after this one.
# Java's client makes such an offer (h2c) with its first request. A server may take no notice of it (RFC 9110, 7.8).
_UPGRADE, _DECLINED = re.compile(rb"(?<=\r\n)upgrade(?=[ \t]*:)", re.IGNORECASE), b"x-offer"

log = logging.getLogger("saccade")


Refused = Callable[[str, ErrorReply], None]  # told of a connection that was refused: the answer's id, the answer


def http_protocol(limits: Limits, refused: Refused = lambda *_: None) -> type[asyncio.Protocol]:
    """What uvicorn's Config takes as ``http``."""
    return cast("type[asyncio.Protocol]", partial(GuardedProtocol, limits, refused))


class GuardedProtocol(HttpToolsProtocol):
    """One connection. At most one timer runs for what is read, and one for what is written.

    What is read is a head (timed from its first byte, or from the connection's beginning), or the rest of a body whose
    request is answered already: it is thrown away, since a client that is cut off while it sends reads no answer.
    """

    def __init__(self, limits: Limits, refused: Refused, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._tell = refused
        self._part: Literal["none", "head", "body"] = "none"  # of a message, that has begun and is not complete
        self._begun = 0  # messages, in the bytes that are being parsed
        self._fed = False  # there is some of a body in them
        self._head_bytes = 0
        self._frame_bytes = 0  # that came since there was any of a body: of trailers, or of a chunk's extension
        self._refused = False
        self._awaited: Literal["nothing", "head", "rest"] = "nothing"
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # the connection --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            message = "The server has too many connections. Try again later."
            self._refuse(reply_to(OverloadedError(message, limit="max_connections")))
        else:
            self._await("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._await("nothing")
        self._stop_write_timer()
        self._unset_keepalive_if_required()  # uvicorn forgets it where a client resets the connection: for 75 seconds
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        part, self._begun, self._fed = self._part, 0, False
        if part != "body" and b"pgrade" in data:
            data = _UPGRADE.sub(_DECLINED, data)
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        # of bytes that end one message and begin the next, nobody knows which are whose
        if self._part == "head" and (part, self._begun) in (("head", 0), ("none", 1)):
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.max_header_size:
                self._refuse(_HEAD_TOO_LARGE)
                return
        if part == self._part == "body" and self._is_framed_without_end(len(data)):
            return
        if self._part == "head" or (self._part == "none" and self._answered()):
            self._await("head")  # also after bytes that begin no message: they have ended the keep-alive timer

    # what the parser calls -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part, self._head_bytes, self._frame_bytes = "head", 0, 0
        self._begun += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part == "head":  # a trailer is no header: nobody on the way here has looked at it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._part = "body"
        self._await("nothing")

    def on_body(self, body: bytes) -> None:
        self._fed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._part = "none"
        self._await("nothing")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._part == "body" and self._answered() and not self.transport.is_closing():
            self._await("rest")

    def send_400_response(self, msg: str) -> None:
        self._refuse(_NO_HTTP)

    def _unsupported_upgrade_warning(self) -> None:
        """The parser stopped at an offer that came in two pieces, and has thrown the body away."""
        self._refuse(_NO_UPGRADE)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        is_old = cycle.scope["http_version"] != "1.1"
        super()._start_asgi_task(cycle, close_delimited(app, cycle) if is_old else app)  # type: ignore[arg-type]

    # slow readers ----------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client has left 64 KiB unread beside what the kernel holds."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self._limits.write_timeout, self._cut_off)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _cut_off(self) -> None:
        scope = {} if self.cycle is None else self.cycle.scope
        about = {"request_id": scope.get("state", {}).get("request_id")}
        message = "a client that did not read for %g s was cut off"
        log.info(message, self._limits.write_timeout, extra={"fields": about})
        self.transport.abort()  # to the application the client has left: its request is cancelled

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # slow senders ----------------------------------------------------------------------------------------------------

    def _answered(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await(self, what: Literal["nothing", "head", "rest"]) -> None:
        """Expect something of the client within its time; one that is expected already keeps its timer."""
        if what == self._awaited:
            return
        self._awaited = what
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        if what != "nothing":
            seconds = self._limits.header_timeout if what == "head" else self._limits.body_timeout
            self._read_timer = self.loop.call_later(seconds, self._too_late)

    def _is_framed_without_end(self, size: int) -> bool:
        """Whether trailers or the extension of a chunk take more than a head may; then this ends.

        Args:
            size: of the bytes that came now, all of them of a body that goes on.
        """
        self._frame_bytes = 0 if self._fed else self._frame_bytes + size
        if self._frame_bytes <= self._limits.max_header_size:
            return False
        if self._answered():
            self.transport.close()
        else:
            self._refuse(_HEAD_TOO_LARGE)
        return True

    def _too_late(self) -> None:
        if self._awaited == "head" and self._part == "head":
            self._refuse(_HEAD_TOO_LATE)
        else:  # a connection that nothing came on, or an answer that was given long ago
            self.transport.close()

    def _refuse(self, reply: ErrorReply) -> None:
        """Answer on a connection on which no request can come any more, and end it."""
        self._refused = True
        self._await("nothing")
        self._unset_keepalive_if_required()
        if not self._answered():
            if self.pipeline or self.cycle.response_started:  # an answer is on its way: another must not get into it
                self.transport.close()
                return
            self.cycle.disconnected = True  # to the application the client has left
            self.cycle.message_event.set()
        request_id = new_id()
        self.transport.write(reply.raw(request_id))
        self._tell(request_id, reply)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        else:  # TLS
            self.transport.close()


_NO_HTTP = ErrorReply(400, "invalid_request_error", "invalid_http", "The request is not valid HTTP.")
_NO_UPGRADE = ErrorReply(
    400, "invalid_request_error", "invalid_http", "This server speaks HTTP/1.1 only; leave the header Upgrade out."
)
_HEAD_TOO_LARGE = ErrorReply(
    431, "invalid_request_error", "headers_too_large", "The request's headers are too large for this server."
)
_HEAD_TOO_LATE = ErrorReply(408, "timeout_error", "request_timeout", "The request's headers did not arrive in time.")
