"""An engine in a thread of this process: for scripts and tests, where a second process would be in the way."""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable

from decoding.errors import ConfigError
from decoding.messages import FromEngine, LoadFailed, Ready, Shutdown, ToEngine
from server.engine_client import RoutedEngineClient
from server.engine_driver import EngineDriver, SteppedEngine


class InProcessEngineClient(RoutedEngineClient):
    """Loads the engine and steps it in one thread.

    Args:
        load: makes the engine; called in that thread.
    """

    def __init__(self, load: Callable[[], SteppedEngine]) -> None:
        super().__init__()
        self._load = load
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._load_error: ConfigError | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        await self._wait_loaded()
        if self._state != "ready":
            raise self._load_error or ConfigError("The engine's thread ended while it loaded; its log is above.")

    async def close(self) -> None:
        self._close_down()
        self._inbox.put(Shutdown())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def _post(self, message: FromEngine) -> None:
        """From the engine's thread to the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._arrive, message)

    def _arrive(self, message: FromEngine) -> None:
        if isinstance(message, LoadFailed):
            self._die(message.message)
        else:
            self._receive(message)

    def _run(self) -> None:
        try:
            self._serve(self._load())
        except ConfigError as error:
            self._load_error = error
            self._post(LoadFailed(str(error)))
        except Exception as error:  # noqa: BLE001 - the boundary that a process is for the socket client
            traceback.print_exc()
            self._post(LoadFailed(f"The engine ended: {type(error).__name__}: {error}"))

    def _serve(self, engine: SteppedEngine) -> None:
        driver = EngineDriver(engine, self._post, self._next)
        driver.report()
        self._post(Ready(engine.info))
        try:
            while self._drain(driver):
                if driver.has_work:
                    driver.step()
        finally:
            engine.close()

    def _next(self) -> ToEngine | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return None

    def _drain(self, driver: EngineDriver) -> bool:
        """Act on what has come; an engine without work waits for the next message."""
        while driver.drain():
            if driver.has_work:
                return True
            if not driver.apply(self._inbox.get()):
                break
        return False
