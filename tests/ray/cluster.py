"""Ray with replicas, as ``saccade ray`` starts them, on free ports of the loopback interface."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.api.harness import eventually
from tests.process.serving import children, command_line

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker" / "ray" / "serve.yaml"
START_SECONDS = 150
END_SECONDS = 60
COUNTING = "tests.process.counting_engine:CountingEngine"


@dataclass
class Cluster:
    """A running ``saccade ray``.

    Attributes:
        log: what it and its processes write.
    """

    process: subprocess.Popen[bytes]
    url: str
    metrics_ports: range
    log: Path
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def replicas(self) -> dict[str, int]:
        """The replicas that answer on ports of their own: name, port."""
        found = {}
        for port in self.metrics_ports:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                if answer.status_code == 200:
                    found[answer.headers["x-saccade-replica"]] = port
        return found

    def metric(self, port: int, name: str) -> float:
        """A metric without labels of the replica on a port."""
        lines = [line.split() for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()]
        [value] = [line[1] for line in lines if line[0] == name]
        return float(value)

    def engines(self) -> dict[int, int]:
        """Engine processes, and the replicas' processes over them."""
        pids = descendants(self.process.pid)
        found = [(pid, re.search(r"--parent (\d+)", command_line(pid))) for pid in pids]
        return {pid: int(match[1]) for pid, match in found if match and "server.engine_process" in command_line(pid)}

    def complete(self, **body: Any) -> httpx.Response:
        """One completion."""
        return self.http.post("/v1/completions", json=body)


class Stream(threading.Thread):
    """A streamed completion that somebody reads to its end."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__()
        self._url, self._body = url, body
        self.lines: list[str] = []
        self.times: list[float] = []
        self.replica = ""
        self.failure: Exception | None = None
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        body = {**self._body, "stream": True}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=120) as response:
                self.replica = response.headers.get("x-saccade-replica", "")
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)
                        self.times.append(time.monotonic())
                        self.begun.set()
        except httpx.HTTPError as error:
            self.failure = error
        self.begun.set()

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The error events."""
        found = [json.loads(line.removeprefix("data: ")) for line in self.lines if '"error"' in line]
        return [each["error"] for each in found]

    @property
    def whole(self) -> bool:
        """It came to its own end, and nothing went wrong."""
        return self.failure is None and not self.errors and self.lines[-1:] == ["data: [DONE]"]


def descendants(pid: int) -> list[int]:
    """A process, its children and theirs."""
    with contextlib.suppress(OSError):
        return [pid, *(below for child in children(pid) for below in descendants(child))]
    return []


def running(pids: list[int]) -> list[int]:
    """Those that have not ended."""
    return [pid for pid in pids if command_line(pid)]


@contextlib.contextmanager
def cluster(serve: str, *, replicas: int = 2, ray: dict[str, Any] | None = None, **args: Any) -> Iterator[Cluster]:
    """``saccade ray`` with the flags ``serve`` for replicas; ready for requests, and gone without a trace afterwards.

    Args:
        replicas: that are waited for.
        ray: options of the deployment; default: so many replicas, and no more.
        args: others of the application.
    """
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets are in it
    ports = _free_ports()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port = ports.start - 1
    [application] = config["applications"]
    application["args"] = {"serve": serve, "metrics_ports": f"{ports.start}-{ports.stop - 1}", **args}
    application["deployments"] = [{"name": "replica", **(ray or {"num_replicas": replicas})}]
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "server.cli", "ray", str(folder / "serve.yaml"), "--temp-dir", str(folder / "t")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)
    started = Cluster(process, f"http://127.0.0.1:{port}", ports, folder / "log")
    try:
        ready = eventually(lambda: process.poll() is not None or len(started.replicas()) >= replicas, START_SECONDS)
        assert ready, started.log.read_text()
        assert process.poll() is None, started.log.read_text()
        assert eventually(lambda: started.http.get("/health").status_code == 200, 20), started.log.read_text()
        yield started
    finally:
        pids = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        finally:
            left = [] if eventually(lambda: not running(pids), 10) else running(pids)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            started.http.close()
        told = started.log.read_text()
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"processes were left: {left}\n{told}"
    assert process.returncode == 0, told


def _free_ports() -> range:
    """Nine ports in a row that nobody listens on: for HTTP, and for metrics."""
    for start in range(20100, 32000, 9):
        with contextlib.ExitStack() as taken:
            try:
                for port in range(start, start + 9):
                    listener = taken.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return range(start + 1, start + 9)
    raise OSError("no ports are free")
