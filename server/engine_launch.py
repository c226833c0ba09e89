"""Starts an engine process and ends it; the parent's side of ``server.engine_process``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping

import msgspec

from decoding.config import EngineConfig
from decoding.machine import cores
from server.log import Relay
from server.observation import Observation

# OpenMP's idle threads. Left alone they spin for milliseconds and starve the HTTP process on a small machine; with
# OMP_WAIT_POLICY=passive they sleep at once, and every small operation pays about 50 us to wake them. This many turns
# bridge the gaps between the operations of one step, and end soon after the last one.
GOMP_SPINCOUNT = 20000
POLL_SECONDS = 0.05
EXIT_SECONDS = 2.0  # how long an engine may take to end by itself: drafters write what they keep


def engine_environment(config: EngineConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The engine process's environment: it must be there before torch is imported.

    The threads are those of all its ranks together, which come from it: each rank has its share.

    Threads are not pinned: two engines on a machine would be pinned to the same cores. Whoever gives an engine cores of
    its own can say so (``OMP_PROC_BIND=close OMP_PLACES=cores``), and is obeyed, as with every variable set already.
    """
    env = dict(environment)
    if "OMP_WAIT_POLICY" not in env and "GOMP_SPINCOUNT" not in env:
        env["GOMP_SPINCOUNT"] = str(GOMP_SPINCOUNT)
    if config.threads is not None or "OMP_NUM_THREADS" not in env:
        threads = config.threads or cores().engine_threads()
        env["OMP_NUM_THREADS"] = str(max(1, threads // config.tensor_parallel_size))
    return env


class EngineProcess:
    """A running engine process."""

    def __init__(self, config: EngineConfig, address: str, engine: str, observation: Observation) -> None:
        """Start it, on a thread that lives as long as the process: it dies with its starter (see prctl(2))."""
        command = [sys.executable, "-m", "server.engine_process"]
        command += ["--address", address, "--parent", str(os.getpid()), "--engine", engine]
        command += ["--log-format", observation.log_format, "--log-level", observation.log_level]
        self._relay = Relay("saccade.engine") if observation.log_format == "json" else None
        # a session of its own: ctrl-C in the terminal reaches the parent alone, which then ends the engine
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=None if self._relay is None else self._relay.fileno(),
            env=engine_environment(config, os.environ),
            start_new_session=True,
        )
        if self._relay is not None:
            self._relay.handed_over()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(msgspec.msgpack.encode(config))

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status, as soon as it has ended."""
        while (status := self._process.poll()) is None:
            await _ended(self._process.pid)
        return status

    async def stop(self) -> None:
        """Wait for it to end by itself, and kill it if it does not."""
        try:
            # not wait_for: before Python 3.12 it loses a cancellation that comes as the process ends
            async with asyncio.timeout(EXIT_SECONDS):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()
        if self._relay is not None:
            await asyncio.to_thread(self._relay.join)

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()


async def _ended(pid: int) -> None:
    """Wait for the end of a child that was not reaped; where there are no pidfds, for a moment."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or a sandbox
        await asyncio.sleep(POLL_SECONDS)
        return
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    return f"it was killed by signal {-status}" if status < 0 else f"it exited with status {status}"
