"""Runs the server: the port first, then the engine, then requests, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from decoding.acceptance import LOSSY, Acceptance
from decoding.config import EngineConfig
from server.backend import Backend
from server.engine_driver import ENGINE
from server.http_protocol import Refused, http_protocol
from server.idle_memory import give_back_when_idle
from server.limits import Limits
from server.listening import Address, allow_many_connections, is_loopback, listen
from server.model_folder import tokenizer_folder
from server.security import Tls
from server.settings import ServerSettings

CLOSE_SECONDS = 1  # after the drain, for the last events to be sent

log = logging.getLogger("saccade")


class _UvicornServer(uvicorn.Server):
    """Leaves signals to ``Service``, and gives a TLS handshake the time of a head, where asyncio gives it a minute."""

    def __init__(self, config: uvicorn.Config, handshake_seconds: float) -> None:
        super().__init__(config)
        self._handshake_seconds = handshake_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        make = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        protocol = partial(make, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        tls = self.config.ssl
        seconds = None if tls is None else self._handshake_seconds
        listening = partial(asyncio.get_running_loop().create_server, protocol, ssl=tls, backlog=self.config.backlog)
        self.servers = [
            await listening(sock=each, ssl_handshake_timeout=seconds, ssl_shutdown_timeout=seconds)
            for each in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: FastAPI, limits: Limits, tls: ssl.SSLContext | None = None) -> uvicorn.Server:
    """The HTTP server of an application of ``build_app``."""
    return server_of(app, app.state.refused, limits, tls)


def server_of(app: ASGIApp, refused: Refused, limits: Limits, tls: ssl.SSLContext | None = None) -> uvicorn.Server:
    """The HTTP server of any application."""
    config = uvicorn.Config(
        app,
        loop="asyncio",  # uvloop, measured with benchmarks/http_stream.py, brought nothing here
        http=http_protocol(limits, refused),
        ws="none",
        log_config=None,
        log_level="error",  # its warnings are of what clients send, who could fill the log with them
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_keep_alive=limits.keep_alive_timeout,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        ssl_context_factory=None if tls is None else partial(_ready_made, tls),
    )
    return _UvicornServer(config, limits.header_timeout)


def _ready_made(context: ssl.SSLContext, *_: object) -> ssl.SSLContext:
    return context


def exempt_from_collection() -> None:
    """What is loaded stays: looking through it again and again would stall all streams, tens of milliseconds a time."""
    gc.collect()
    gc.freeze()


class Service:
    """The HTTP server and the engine under it.

    Args:
        tls: for HTTPS.
        engine: the class that the engine process runs, as "module:class".
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: ServerSettings,
        chat_template: str | None,
        listener: socket.socket,
        *,
        tls: ssl.SSLContext | None = None,
        engine: str = ENGINE,
    ) -> None:
        self._config = config
        self._settings = settings
        self._listener = listener
        self._tls = tls
        self._backend = Backend(config, settings, chat_template, engine)
        self._engine = self._backend.engine
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; a second one ends the process at once.

        Raises:
            ConfigError: the model cannot be loaded.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._serve()
        finally:
            await self._backend.close()

    async def _serve(self) -> None:
        folder = tokenizer_folder(self._config)
        loading = asyncio.create_task(self._engine.start())
        stopped = asyncio.create_task(self._stop.wait())
        beside = [loading, stopped]
        try:
            http, server = await self._start_http(folder)
            try:
                await asyncio.wait({loading, stopped, http}, return_when=asyncio.FIRST_COMPLETED)
                if loading.done():
                    loading.result()
                    exempt_from_collection()
                    self._announce()
                    beside.append(asyncio.create_task(give_back_when_idle(lambda: self._engine.in_flight == 0)))
                    await asyncio.wait({stopped, http}, return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
            finally:  # also when the model cannot be loaded: who connects as the loop ends would be left in the middle
                server.should_exit = True
                await http
        finally:
            for each in beside:
                each.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _start_http(self, folder: Path) -> tuple[asyncio.Task[None], uvicorn.Server]:
        """The HTTP server answers while the model loads, /health with 503."""
        app = await self._backend.application(folder)
        server = http_server(app, self._settings.limits, self._tls)
        return asyncio.create_task(server.serve(sockets=[self._listener])), server

    async def _drain(self) -> None:
        log.info("shutting down: %d requests in flight", self._engine.in_flight)
        await self._engine.drain(self._settings.limits.shutdown_timeout)
        await self._engine.close()  # what is still in flight gets its error now

    def _on_signal(self) -> None:
        if self._stop.is_set():
            os._exit(130)  # the engine's process dies with this one
        self._stop.set()

    def _announce(self) -> None:
        info, stats = self._engine.info, self._engine.stats()
        drafters = ", ".join(info.drafters) if info.drafters else "none (plain decoding)"
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        weights = info.dtype if info.quantization == "none" else f"{info.dtype} with {info.quantization} weights"
        place = info.device if info.tensor_parallel_size == 1 else f"{info.tensor_parallel_size} ranks, {info.device}"
        log.info("model     %s: %s on %s, context %d", info.model, weights, place, info.max_model_len)
        log.info("memory    %d pages of K/V", stats.pages_total)
        log.info("drafters  %s", drafters)
        rule = Acceptance.parse(self._config.acceptance).rule
        if rule in LOSSY:
            log.info("rule      %s (lossy: the text is not that of plain decoding)", self._config.acceptance)
        scheme = "http" if self._tls is None else "https"
        names = ", ".join(self._settings.model_names)
        log.info("ready     %s://%s:%d/v1, model name %s", scheme, shown, port, names)


def serve(
    config: EngineConfig,
    settings: ServerSettings,
    chat_template: str | None,
    address: Address,
    tls: Tls | None = None,
    engine: str = ENGINE,
) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: a setting that cannot work.
    """
    context = None if tls is None else tls.context()
    listener = listen(address, settings.limits.write_timeout)
    allow_many_connections()
    if not settings.security.api_keys and not is_loopback(listener):
        log.warning("no API key is set: whoever reaches %s can use this server (see --api-key-file)", address.host)

    async def run() -> None:
        await Service(config, settings, chat_template, listener, tls=context, engine=engine).run()

    try:
        asyncio.run(run())
    finally:
        listener.close()
