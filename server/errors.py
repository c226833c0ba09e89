"""How every error looks on the wire: one JSON envelope, OpenAI's statuses, types and codes.

Messages are bounded and never repeat the client's input beyond a short field name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from starlette.responses import Response

from decoding.errors import EngineDeadError, RequestError, SaccadeError

MAX_MESSAGE_CHARS = 1000
RETRY_AFTER_SECONDS = 2

_STATUS_BY_CODE = {
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "content_too_large": 413,
    "unsupported_media_type": 415,
}


class UnavailableError(SaccadeError):
    """The server cannot take a request now: it is loading, restarting or shutting down. An HTTP 503."""

    def __init__(self, message: str, *, code: str = "server_is_overloaded") -> None:
        super().__init__(message)
        self.code = code


class GenerationError(SaccadeError):
    """The engine gave up on one request and goes on with the others. An HTTP 500."""


@dataclass(frozen=True)
class ErrorReply:
    """An error, ready for the wire."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON envelope, ``{"error": {...}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        content = json.dumps(self.body(), separators=(",", ":"))
        return Response(content, self.status, headers=self.headers, media_type="application/json")


def reply_to(error: BaseException) -> ErrorReply:
    """The reply to an error; an error that is not ours gets a sentence that gives nothing away."""
    if isinstance(error, RequestError):
        status = _STATUS_BY_CODE.get(error.code, 400)
        return ErrorReply(status, "invalid_request_error", error.code, bounded(error.message), error.param)
    if isinstance(error, UnavailableError):
        return _unavailable(error.code, str(error))
    if isinstance(error, EngineDeadError):
        return _unavailable("engine_dead", str(error))
    if isinstance(error, GenerationError):
        return ErrorReply(500, "server_error", "internal_error", bounded(str(error)))
    message = "The server made a mistake while answering this request; its log says more, under the x-request-id."
    return ErrorReply(500, "server_error", "internal_error", message)


def bounded(message: str) -> str:
    """The message, cut to a length that no client input can blow up."""
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


def _unavailable(code: str, message: str) -> ErrorReply:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ErrorReply(503, "service_unavailable_error", code, bounded(message), headers=headers)
