"""Around every request: its id, the counters, admission. Plain ASGI: streams and disconnects pass untouched."""

from __future__ import annotations

import re
import secrets
import time
from typing import cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoding.errors import SaccadeError
from server.admission import Admission
from server.errors import reply_to
from server.metrics import Metrics

REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Gives each response an x-request-id (the client's own, if it sent a sane one) and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # an answer that never started: the client had left
        request_id = assign_id(scope)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        self._metrics.begin_request()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.end_request(_route(scope), _method(scope), status, time.monotonic() - started)


class AdmissionMiddleware:
    """Holds a request's admission until its answer has been sent, streams included."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            admitted = self._admission.admit(scope)
        except SaccadeError as error:
            await reply_to(error).response()(scope, receive, send)
            return
        with admitted:
            await self._app(scope, receive, send)


def assign_id(scope: Scope) -> str:
    """The request's id, made once; kept in ``scope["state"]``."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get(REQUEST_ID, "")
        state["request_id"] = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
    return cast(str, state["request_id"])


def _route(scope: Scope) -> str:
    """The route's pattern; paths that are none share one label, so that a scanner cannot fill the memory."""
    return getattr(scope.get("route"), "path", "unknown")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in {"GET", "POST"} else "other"
