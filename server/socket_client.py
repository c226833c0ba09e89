"""An engine in a process of its own, over ZeroMQ on a Unix socket that no other user can reach."""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile

import msgspec
import zmq
import zmq.asyncio

from decoding.config import EngineConfig
from decoding.errors import ConfigError
from decoding.messages import FromEngine, LoadFailed, Shutdown, ToEngine
from server.engine_client import RoutedEngineClient
from server.engine_driver import ENGINE
from server.engine_launch import EngineProcess, describe_exit
from server.limits import Limits
from server.observation import Observation

log = logging.getLogger("saccade")

_DRAIN_SECONDS = 0.1  # for what a dead engine had sent before
_MESSAGES_IN_A_ROW = 16  # read before their receivers have a turn: what piled up is merged, and nobody starves
_WATCHDOG_CHECKS = 4  # in the time that a hung engine is given


class SocketEngineClient(RoutedEngineClient):
    """One engine process, from its start to its end; it is not started twice (see Supervisor).

    Args:
        engine: the class that it runs, as "module:class".
        limits: how long an engine with work may be silent, and how much of an answer may wait for its reader.
        observation: how the process logs.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        engine: str = ENGINE,
        limits: Limits | None = None,
        observation: Observation | None = None,
    ) -> None:
        limits = limits or Limits()
        super().__init__(limits.max_pending_tokens)
        self._watchdog_seconds = limits.watchdog_timeout
        self._config = config
        self._engine = engine
        self._observation = observation or Observation()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._directory: str | None = None
        self._process: EngineProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._load_failure: str | None = None

    @property
    def pid(self) -> int | None:
        """The engine's process id."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        self._process = EngineProcess(self._config, self._bind(), self._engine, self._observation)
        process = self._process
        work = (self._read(), self._watch(process), self._kill_if_hung(process))
        self._tasks = [asyncio.create_task(each) for each in work]
        await self._wait_loaded()
        if self._state != "ready":
            await self.close()
            raise ConfigError(self._load_failure or "The engine process ended while it loaded; its log is above.")
        self._remove_directory()  # both ends are connected: nobody needs the path, and a killed server leaves none

    async def close(self) -> None:
        if self._socket.closed:
            return
        was_ready = self._state == "ready"
        self._close_down()
        if self._process is not None:
            if was_ready:
                self._send(Shutdown())
            else:
                self._process.kill()
            await self._process.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        self._remove_directory()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _bind(self) -> str:
        self._directory = tempfile.mkdtemp(prefix="saccade-")  # mode 0700
        address = f"ipc://{self._directory}/engine"
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot open the socket {address}: {error}; point TMPDIR to a short path") from error
        return address

    def _send(self, message: ToEngine) -> None:
        sent = asyncio.ensure_future(self._socket.send(self._encoder.encode(message), flags=zmq.NOBLOCK))
        # it fails when the engine is gone: _watch tells every request, so there is nothing to do here
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _read(self) -> None:
        for count in itertools.count(1):
            if count % _MESSAGES_IN_A_ROW == 0:
                await asyncio.sleep(0)  # a message that is there already does not wait, and lets nobody else run
            try:
                message = self._decoder.decode(await self._socket.recv())
            except msgspec.DecodeError as error:  # two versions of the code, or memory gone bad
                log.error("the engine sent what is no message: %s", error)
                if self._process is not None:
                    self._process.kill()  # _watch does the rest
                return
            if isinstance(message, LoadFailed):
                self._load_failure = message.message
                self._die(message.message)
            else:
                self._receive(message)

    async def _watch(self, process: EngineProcess) -> None:
        status = await process.wait()
        if self._state == "ready":
            log.error("the engine process ended: %s", describe_exit(status))
        self._state = "dead"  # at once, for /health; requests first get what was still on its way
        await asyncio.sleep(_DRAIN_SECONDS)
        self._die(f"The engine ended ({describe_exit(status)}); the request was not finished and can be sent again.")

    async def _kill_if_hung(self, process: EngineProcess) -> None:
        """End an engine that has requests and has sent nothing for too long; ``_watch`` does the rest.

        Checks are counted, not seconds: after a pause of this process itself (a laptop's sleep, say) what the engine
        sent meanwhile is read before the next check.
        """
        silent, heard = 0, self._heard
        while silent <= _WATCHDOG_CHECKS:
            await asyncio.sleep(self._watchdog_seconds / _WATCHDOG_CHECKS)
            silent = silent + 1 if len(self._router) and self._heard == heard else 0
            heard = self._heard
        log.error("the engine has requests and sent nothing for %g s: it is killed", self._watchdog_seconds)
        process.kill()
