"""The application of ``saccade serve`` as one replica of several."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.ray.exchange import READ, Window

REPLICA = "x-saccade-replica"  # of an answer: who gave it; of a GET: who is asked
ELSEWHERE = "x-saccade-elsewhere"  # of an answer: this replica did nothing, as it has no engine now; another may
PIN = "="  # before a replica's name in place of keys: this one and no other
NOT = "!"  # before a replica's name, before keys: another one, if there is any


class ReplicaApp:
    """An ASGI application that tells its name, and sends no faster than the client reads.

    Args:
        name: of the replica.
        ready: whether its engine can take requests.
    """

    def __init__(self, app: ASGIApp, name: str, ready: Callable[[], bool]) -> None:
        self._app = app
        self._name = name
        self._ready = ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        refuses = scope["method"] == "POST" and not self._ready()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REPLICA] = self._name
                if refuses and message["status"] == 503:
                    headers[ELSEWHERE] = "?1"
            await send(message)

        if READ not in scope.get("extensions", {}):  # not through our proxy: nobody tells what was read
            await self._app(scope, receive, send_named)
            return
        async with Window(receive, send_named) as window:
            await self._app(scope, window.receive, window.send)
