"""A real server as a child process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "server.cli")
COUNTING = (sys.executable, "-m", "tests.process.counting_server", "demo/target")  # a program for ``serving``
# fixed trees: what an auto plan drafts depends on the clock
DRAFTERS = ("--speculate", "draft=demo/draft", "--speculate", "ngram", "--plan", "fixed")
DEMO = ("demo/target", *DRAFTERS, "--kv-cache-memory", "64MiB")
START_SECONDS = 120  # on a machine that has other things to do
EXIT_SECONDS = 5.0


@dataclass
class Served:
    """A running ``saccade serve``."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def engine_pid(self) -> int:
        """The one child of the server that is an engine; another checks grammars."""
        (pid,) = (pid for pid in children(self.process.pid) if "server.engine_process" in command_line(pid))
        return pid

    def metrics(self) -> dict[str, float]:
        """The metrics, each added up over its labels."""
        found = Counter[str]()
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:  # asked for often: httpx is not cheap
            lines = answer.read().decode().splitlines()
        for line in lines:
            if not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                found[sample.partition("{")[0]] += float(value)  # type: ignore[assignment]
        return dict(found)

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, float]:
        """Send a signal and wait: (exit status, seconds)."""
        started = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(30)
        return status, time.monotonic() - started


def children(pid: int) -> list[int]:
    """Child processes of all threads of a process (Linux)."""
    found = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for group in found for child in group]


def command_line(pid: int) -> str:
    """What a process was started with (Linux); nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""


def run(*args: str, seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
    """``saccade`` with these arguments, to its end."""
    return subprocess.run([*COMMAND, *args], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


@contextlib.contextmanager
def serving(*args: str, program: Sequence[str] = (*COMMAND, "serve"), **environment: str) -> Iterator[Served]:
    """A server on a free port, ready for requests; ended at the latest when the context is left."""
    command = [*program, "--port", "0", *args]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    served, ready = Served(process), threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            served.log.append(line)
            if found := re.search(r"ready +(https?://\S+)/v1", line):
                served.url = found[1]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        ready.wait(START_SECONDS)
        assert served.url, "".join(served.log)
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stderr.close()  # type: ignore[union-attr]
