"""Web pages of other origins, with errors in the form of all errors here."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from server.errors import ErrorReply


class OriginMiddleware(CORSMiddleware):
    """Starlette's, which refuses a browser's question before a request in plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        message = f"{bytes(answer.body).decode()}: this server does not take it from web pages (see --cors-origins)."
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return ErrorReply(
            answer.status_code, "invalid_request_error", "cors_not_allowed", message, headers=headers
        ).response()
