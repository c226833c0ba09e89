"""Around every request: its id, the counters, admission, the time for its body.

Plain ASGI: streams and disconnects pass untouched.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoding.errors import SaccadeError
from server.account import Account, generated_of
from server.admission import Admission, keep_ticket
from server.errors import LateError, error_of, keep_error, reply_to
from server.log import answering
from server.metrics import Metrics

REQUEST_ID = "x-request-id"
QUIET = frozenset({"/health", "/ready", "/live", "/metrics"})  # asked for again and again
Watcher = Callable[[Account, Scope], None]
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Gives each response an x-request-id (the client's own, if it sent a sane one) and counts it.

    Args:
        watchers: are told of each request that was answered, those of ``QUIET`` routes left out unless they failed.
        routes: that a path may be of which was turned away before it was looked for.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, watchers: Sequence[Watcher] = (), routes: Collection[str] = ()
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._watchers = watchers
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # an answer that never started: the client had left
        request_id = assign_id(scope)
        answering.set(request_id)  # in this request's own task: there is nothing to undo

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        self._metrics.begin_request()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            status = 500
            keep_error(scope, reply_to(error))
            raise
        finally:
            seconds = time.monotonic() - started
            account = Account(
                request_id, _method(scope), self._route(scope), status, seconds, generated_of(scope), error_of(scope)
            )
            self._metrics.end_request(account)
            if account.route not in QUIET or status >= 400:
                for watcher in self._watchers:
                    watcher(account, scope)

    def _route(self, scope: Scope) -> str:
        """The route's pattern; paths that are none share one label, so that a scanner cannot fill the memory."""
        path = getattr(scope.get("route"), "path", scope["path"])
        known = "route" in scope or path in self._routes
        return str(path) if known else "unknown"


class AdmissionMiddleware:
    """Holds a request's admission until its answer has been sent, streams included."""

    def __init__(self, app: ASGIApp, admission: Admission, body_seconds: float) -> None:
        self._app = app
        self._admission = admission
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                ticket = held.enter_context(self._admission.admit(scope))
                left = ticket.remaining()
            except SaccadeError as error:
                await reply_to(error).response()(scope, receive, send)
                return
            keep_ticket(scope, ticket)
            seconds = self._body_seconds if left is None else min(self._body_seconds, left)
            await self._app(scope, in_time(receive, seconds), send)


def in_time(receive: Receive, seconds: float) -> Receive:
    """``receive`` that raises LateError when the body is not there so long after it was first asked for.

    A limit on the whole of it: one on each piece could be kept with a byte a minute.
    """
    deadline: float | None = None
    complete = False

    async def receive_in_time() -> Message:
        nonlocal deadline, complete
        if complete:  # what comes now is the client's leaving, whenever that may be
            return await receive()
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise LateError(
                f"The request's body did not arrive within {seconds:g} seconds.", code="request_timeout"
            ) from None
        complete = not message.get("more_body", False)
        return message

    return receive_in_time


def assign_id(scope: Scope) -> str:
    """The request's id, made once; kept in ``scope["state"]``."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get(REQUEST_ID, "")
        state["request_id"] = given if _SANE_ID.fullmatch(given) else new_id()
    return cast(str, state["request_id"])


def new_id() -> str:
    """An id for a request that brought none."""
    return f"req-{secrets.token_hex(12)}"


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in {"GET", "POST"} else "other"
