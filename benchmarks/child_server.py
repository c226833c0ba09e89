"""Servers that are measured: started as child processes on the loopback interface, ended with us."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec

from benchmarks.load.client import open_http, post
from decoding.errors import ConfigError

START_SECONDS = 180.0
REQUEST_SECONDS = 600.0
END_SECONDS = 10.0
_LOG_LINES = 20  # of a server that did not start
_POLL_SECONDS = 0.02

# The kernel ends the server when we end, however that happens (prctl(2), PR_SET_PDEATHSIG; Linux). It survives exec.
_LAUNCH = """\
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 15)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def bare_environment() -> dict[str, str]:
    """Ours without what steers OpenMP: another project's server is measured with its own defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}


class ChildServer:
    """An HTTP server in a process of its own, and connections to it; the thread that starts it must outlive it."""

    def __init__(self, command: Sequence[str], port: int, environment: Mapping[str, str], connections: int) -> None:
        """Start it and wait until it says that it is healthy.

        Args:
            command: it must listen on ``port`` of 127.0.0.1 and answer ``GET /health`` with 200 when it is ready.
            connections: requests at once.

        Raises:
            ConfigError: it ended, or is not ready in time; with the last lines that it wrote.
        """
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in close()
        address = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=address, trust_env=False)  # for what is not timed
        self._loop = asyncio.Runner()
        self._http = open_http(address, {}, connections, REQUEST_SECONDS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCH, *command],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )
            self._await_health(command[0])
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def posts(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[bytes]:
        """Post all bodies at once: the answers' contents, in the order of the bodies.

        Raises:
            RuntimeError: an answer that is an error.
        """
        return self._loop.run(self._post_all(path, [msgspec.json.encode(body) for body in bodies]))

    def metrics(self) -> dict[str, float]:
        """Its counters and gauges, those without labels."""
        response = self._client.get("/metrics")
        response.raise_for_status()
        lines = [line.split() for line in response.text.splitlines() if not line.startswith("#")]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2 and "{" not in line[0]}

    def log(self) -> str:
        """All that it wrote."""
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """End the process; a second call does nothing."""
        process: subprocess.Popen[bytes] | None = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if not self._http.is_closed:
            self._loop.run(self._http.aclose())
        self._loop.close()
        self._client.close()
        self._log.close()

    async def _post_all(self, path: str, bodies: Sequence[bytes]) -> list[bytes]:
        return await asyncio.gather(*(self._post(path, body) for body in bodies))

    async def _post(self, path: str, body: bytes) -> bytes:
        # bytes as they come, looked through later: parsing events while others wait would be measured too
        status, content = await post(self._http, path, body)
        if status != 200:
            raise RuntimeError(f"POST {path} was answered with {status}: {content[:500]!r}")
        return content

    def _await_health(self, program: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ConfigError(f"{program} ended with status {self._process.returncode}: {self._log_tail()}")
            try:
                if self._client.get("/health", timeout=1.0).status_code == 200:
                    return
            except httpx.TransportError:  # not listening yet
                pass
            time.sleep(_POLL_SECONDS)
        raise ConfigError(f"{program} was not ready after {START_SECONDS:.0f} s: {self._log_tail()}")

    def _log_tail(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-_LOG_LINES:]).strip() or "it wrote nothing"
