"""An engine in a process of its own, used as a library: a task a line from standard input, an answer a line.

What a script does that has no server: submit everything, step until all is done. ``Child`` is the other end.
"""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from benchmarks.measure import Task
from decoding.config import EngineConfig
from decoding.errors import ConfigError, SaccadeError

_END_SECONDS = 10.0


@dataclass(frozen=True)
class Done:
    """A task's outcome."""

    seconds: float  # from the first submission to the last token
    cpu_seconds: float  # of all threads of the process, meanwhile
    steps: int
    texts: list[list[int]]  # tokens, in the order of the task's prompts


class Child:
    """A running engine process.

    Args:
        environment: what OpenMP reads is in it.

    Raises:
        ConfigError: it did not start; its error is on standard error.
    """

    def __init__(self, config: EngineConfig, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.engine_child", msgspec.json.encode(config).decode()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        try:
            self._line()  # it is ready
        except BaseException:
            self.close()
            raise

    def run(self, task: Task) -> Done:
        """Do a task.

        Raises:
            ConfigError: the process ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(task) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=Done)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError("the engine's process ended; its error is above")
        return line


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the lines of standard input."""
    [text] = sys.argv[1:] if argv is None else argv
    config = msgspec.json.decode(text, type=EngineConfig)
    from benchmarks.systems import EngineSystem
    from decoding.engine import Engine

    try:
        system = EngineSystem("library", Engine.load(config))
    except SaccadeError as error:
        print(error, file=sys.stderr)
        return 1
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        task = msgspec.json.decode(line, type=Task)
        gc.collect()
        steps, cpu, started = system.engine.stats().steps, time.process_time(), time.perf_counter()
        texts = system.complete(task)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        done = Done(seconds, cpu, system.engine.stats().steps - steps, texts)
        print(msgspec.json.encode(dataclasses.asdict(done)).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
