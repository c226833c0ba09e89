"""A replica's own /metrics and health, on a port of its own: behind one address nobody knows who answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from decoding.errors import ConfigError, RequestError
from server.auth import METRICS_PATH, OPEN_PATHS
from server.errors import reply_to
from server.http_protocol import Refused
from server.limits import Limits
from server.listening import Address, listen
from server.serve import server_of


class OperationsOnly:
    """Of an application, what those who run it ask for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in (*OPEN_PATHS, METRICS_PATH):
            await self._app(scope, receive, send)
            return
        error = RequestError("This port has a replica's /metrics, /health, /ready and /live.", code="not_found")
        await reply_to(error).response()(scope, receive, send)


class OperationsServer:
    """Listens on the first of several ports that is free.

    Args:
        refused: is told of connections that come to no request.

    Raises:
        ConfigError: none is.
    """

    def __init__(self, app: ASGIApp, refused: Refused, limits: Limits, host: str, ports: Sequence[int]) -> None:
        self._listener = _first_free(host, ports, limits)
        self._server: uvicorn.Server = server_of(OperationsOnly(app), refused, limits)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))

    @property
    def port(self) -> int:
        """On which it listens."""
        port: int = self._listener.getsockname()[1]
        return port

    async def close(self) -> None:
        self._server.should_exit = True
        await asyncio.gather(self._task, return_exceptions=True)
        self._listener.close()


def _first_free(host: str, ports: Sequence[int], limits: Limits) -> socket.socket:
    why = ""
    for port in ports:
        try:
            return listen(Address(host, port), limits.write_timeout)
        except ConfigError as error:
            why = str(error)
    raise ConfigError(f"no port of metrics_ports is free; give more of them (the last one: {why})")
