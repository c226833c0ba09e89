"""How every error looks on the wire: one JSON envelope, OpenAI's statuses, types and codes.

Messages are bounded and never repeat the client's input beyond a short field name; they name no files and no
processes of this machine. The log has what they leave out.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from decoding.errors import EngineDeadError, RequestError, SaccadeError
from server.auth import AuthenticationError

MAX_MESSAGE_CHARS = 1000
RETRY_AFTER_SECONDS = 2.0

_STATUS_BY_CODE = {
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "content_too_large": 413,
    "unsupported_media_type": 415,
    "headers_too_large": 431,
}
_ENGINE_ENDED = "The engine ended before the request was finished; it can be sent again."
_ERROR = "error"


class UnavailableError(SaccadeError):
    """The server cannot take a request now: it is loading, restarting or shutting down. An HTTP 503."""

    def __init__(self, message: str, *, code: str = "server_is_overloaded") -> None:
        super().__init__(message)
        self.code = code


class OverloadedError(SaccadeError):
    """There is no room for one more request. An HTTP 429.

    Args:
        limit: the one that was reached, by its name in ``Limits``.
        retry_after: seconds after which there may be room.
    """

    def __init__(self, message: str, *, limit: str = "", retry_after: float = RETRY_AFTER_SECONDS) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after = retry_after


class LateError(SaccadeError):
    """Time ran out: a body that did not arrive (code request_timeout, an HTTP 408), or an answer that was not finished
    within the request's deadline (deadline_exceeded, an HTTP 504).
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class SlowReaderError(SaccadeError):
    """More of an answer waited for its reader than the server keeps."""


class GenerationError(SaccadeError):
    """The engine gave up on one request and goes on with the others. An HTTP 500."""


@dataclass(frozen=True)
class ErrorReply:
    """An error, ready for the wire.

    Attributes:
        limit: the one that was reached, for those who set it; clients are not told.
    """

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    limit: str = ""

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON envelope, ``{"error": {...}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        return _ErrorResponse(self)

    def raw(self, request_id: str) -> bytes:
        """The whole HTTP/1.1 response, for a connection on which no request came to be; it closes the connection."""
        response = self.response()
        given = [*response.raw_headers, (b"x-request-id", request_id.encode("ascii")), (b"connection", b"close")]
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}".encode("ascii")]
        lines += [name + b": " + value for name, value in given]
        return b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)


class _ErrorResponse(Response):
    """Leaves word of the error where ``error_of`` finds it."""

    def __init__(self, reply: ErrorReply) -> None:
        content = json.dumps(reply.body(), separators=(",", ":"))
        super().__init__(content, reply.status, headers=reply.headers, media_type="application/json")
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keep_error(scope, self._reply)
        await super().__call__(scope, receive, send)


def keep_error(scope: Scope, reply: ErrorReply) -> None:
    """A request ends with this error, be it in the middle of a stream."""
    scope.setdefault("state", {})[_ERROR] = reply


def error_of(scope: Scope) -> ErrorReply | None:
    """What a request ended with; None: all is well, or its client left."""
    return cast("ErrorReply | None", scope.get("state", {}).get(_ERROR))


def reply_to(error: BaseException) -> ErrorReply:
    """The reply to an error; an error that is not ours gets a sentence that gives nothing away."""
    if isinstance(error, RequestError):
        status = _STATUS_BY_CODE.get(error.code, 400)
        return ErrorReply(status, "invalid_request_error", error.code, bounded(error.message), error.param)
    if isinstance(error, AuthenticationError):
        headers = {"WWW-Authenticate": "Bearer"}
        return ErrorReply(401, "authentication_error", "invalid_api_key", str(error), headers=headers)
    if isinstance(error, OverloadedError):
        headers = retry_headers(error.retry_after)
        return ErrorReply(429, "rate_limit_error", "server_overloaded", str(error), headers=headers, limit=error.limit)
    if isinstance(error, LateError):
        return _late(error)
    if isinstance(error, UnavailableError):
        return _unavailable(error.code, str(error))
    if isinstance(error, EngineDeadError):
        return _unavailable("engine_dead", _ENGINE_ENDED)
    if isinstance(error, GenerationError | SlowReaderError):
        code = "internal_error" if isinstance(error, GenerationError) else "slow_reader"
        return ErrorReply(500, "server_error", code, bounded(str(error)))
    message = "The server made a mistake while answering this request; its log says more, under the x-request-id."
    # OpenAI's clients would send the request twice more, and it would meet the same mistake
    return ErrorReply(500, "server_error", "internal_error", message, headers={"x-should-retry": "false"})


def deadline_exceeded() -> LateError:
    """The error of a request whose time is up."""
    return LateError("The request's deadline passed before its answer was finished.", code="deadline_exceeded")


def bounded(message: str) -> str:
    """The message, cut to a length that no client input can blow up."""
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


def retry_headers(seconds: float) -> dict[str, str]:
    """When to come back: whole seconds, as HTTP has them, and OpenAI's milliseconds.

    The latter are spread, so that clients which were turned away together do not come back together.
    """
    milliseconds = int(1000 * seconds * random.uniform(0.75, 1.25))
    return {"Retry-After": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, milliseconds))}


def _unavailable(code: str, message: str) -> ErrorReply:
    headers = retry_headers(RETRY_AFTER_SECONDS)
    return ErrorReply(503, "service_unavailable_error", code, bounded(message), headers=headers)


def _late(error: LateError) -> ErrorReply:
    if error.code == "request_timeout":  # what still comes of the body would be taken for the next request
        return ErrorReply(408, "timeout_error", error.code, str(error), headers={"Connection": "close"})
    return ErrorReply(504, "timeout_error", error.code, str(error))
