"""Runs the server: the port first, then the engine, then requests, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from decoding.acceptance import LOSSY, Acceptance
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from decoding.text import Tokenizer
from server.app import build_app
from server.grammar_worker import GrammarWorker
from server.model_folder import tokenizer_folder
from server.settings import ServerSettings
from server.socket_client import SocketEngineClient
from server.supervisor import Supervisor

DRAIN_SECONDS = 1.0  # after ctrl-C, for requests in flight to end by themselves
CLOSE_SECONDS = 1  # then, for their last event to be sent

log = logging.getLogger("saccade")


@dataclass(frozen=True)
class Address:
    host: str
    port: int


def listen(address: Address) -> socket.socket:
    """A listening socket; taken before the model is loaded, so that a port in use is known at once.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address.host!r}: {error.strerror}; choose another --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(_why_not(address, error)) from error
    listener.setblocking(False)
    return listener


def _why_not(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {address.port} on {address.host} is in use; stop the program that uses it, or choose another port "
            f"with --port {address.port + 1}"
        )
    return f"cannot listen on port {address.port} of {address.host}: {error.strerror}; choose another --port or --host"


class _UvicornServer(uvicorn.Server):
    """Leaves signals to ``Service``."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """The HTTP server and the engine under it."""

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, chat_template: str | None, listener: socket.socket
    ) -> None:
        self._config = config
        self._settings = settings
        self._chat_template = chat_template
        self._listener = listener
        self._engine = Supervisor(lambda: SocketEngineClient(config))
        self._stop = asyncio.Event()
        self._grammars: GrammarWorker | None = None

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
            await self._engine.close()
            if self._grammars is not None:
                await self._grammars.close()

    async def _serve(self) -> None:
        folder = tokenizer_folder(self._config)
        loading = asyncio.create_task(self._engine.start())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            http, server = await self._start_http(folder)
            await asyncio.wait({loading, stopped, http}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                self._announce()
                await asyncio.wait({stopped, http}, return_when=asyncio.FIRST_COMPLETED)
            await self._shut_down(server, http)
        finally:
            loading.cancel()
            stopped.cancel()
            await asyncio.gather(loading, stopped, return_exceptions=True)

    async def _start_http(self, folder: Path) -> tuple[asyncio.Task[None], uvicorn.Server]:
        """The HTTP server answers while the model loads, /health with 503."""
        tokenizer = await asyncio.to_thread(Tokenizer.load, folder, chat_template=self._chat_template)
        self._grammars = GrammarWorker(folder, lambda: self._engine.info.vocab_size)
        app = build_app(self._engine, tokenizer, self._settings, grammars=self._grammars)
        server = _UvicornServer(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        return asyncio.create_task(server.serve(sockets=[self._listener])), server

    async def _shut_down(self, server: uvicorn.Server, http: asyncio.Task[None]) -> None:
        log.info("shutting down")
        await self._engine.drain(DRAIN_SECONDS)
        await self._engine.close()  # what is still in flight gets its error now
        server.should_exit = True
        await http

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
        log.info("model     %s: %s on %s, context %d", info.model, weights, info.device, info.max_model_len)
        log.info("memory    %d pages of K/V", stats.pages_total)
        log.info("drafters  %s", drafters)
        rule = Acceptance.parse(self._config.acceptance).rule
        if rule in LOSSY:
            log.info("rule      %s (lossy: the text is not that of plain decoding)", self._config.acceptance)
        log.info("ready     http://%s:%d/v1, model name %s", shown, port, ", ".join(self._settings.model_names))


def serve(config: EngineConfig, settings: ServerSettings, chat_template: str | None, address: Address) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: a setting that cannot work.
    """
    listener = listen(address)

    async def run() -> None:
        await Service(config, settings, chat_template, listener).run()

    try:
        asyncio.run(run())
    finally:
        listener.close()
