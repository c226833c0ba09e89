"""Our own server over HTTP as a system to be measured, so that what serving costs stands beside the bare engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.child_server import ChildServer, bare_environment, free_port
from benchmarks.load.events import StreamReader
from benchmarks.measure import Run, Task

_COUNTERS = ("steps", "forward_seconds", "draft_seconds", "drafted", "accepted")


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    text: str  # its digest
    tokens: int
    by_drafter: dict[str, dict[str, int]]


class HttpSystem:
    """A running ``saccade serve``, asked by ``batch`` clients at once. Texts stream, as they do to people.

    Answers are text, so ``Run.texts`` are digests of text here, and equal those of other HttpSystems only.
    """

    peer = False

    def __init__(self, name: str, arguments: Sequence[str], batch: int = 1) -> None:
        """Start it.

        Args:
            arguments: what stands behind ``saccade serve``: the model, ``--speculate``, ``--threads`` and so on.

        Raises:
            ConfigError: it does not start; with what it said.
        """
        self.name = name
        self.batch = batch
        self.setting = " ".join(arguments)
        port = free_port()
        # nothing is kept of a prompt from one run to the next, and no defaults of sampling come from the model
        always = ["--no-enable-prefix-caching", "--generation-config", "vllm", "--port", str(port)]
        command = [sys.executable, "-m", "server.cli", "serve", *arguments, *always]
        self._server = ChildServer(command, port, bare_environment(), batch)

    def run(self, task: Task) -> Run:
        bodies = [completion_body(case.ids, case.seed, task) for case in task.cases]
        before = self._server.metrics()
        started = time.perf_counter()
        streams = self._server.posts("/v1/completions", bodies)
        seconds = time.perf_counter() - started
        answers = [read_stream(stream) for stream in streams]
        after = self._server.metrics()
        moved = {name: after[f"saccade_{name}_total"] - before[f"saccade_{name}_total"] for name in _COUNTERS}
        return Run(
            system=self.name,
            round=task.round,
            temperature=task.temperature,
            prompts=tuple(case.index for case in task.cases),
            seconds=seconds,
            tokens=_checked_tokens(self.name, task, answers),
            steps=int(moved["steps"]),
            texts=tuple(answer.text for answer in answers),
            forward_seconds=moved["forward_seconds"],
            draft_seconds=moved["draft_seconds"],
            drafted=int(moved["drafted"]),
            accepted=int(moved["accepted"]),
            by_drafter=_added([answer.by_drafter for answer in answers]),
        )

    def close(self) -> None:
        self._server.close()


def completion_body(ids: Sequence[int], seed: int, task: Task) -> dict[str, Any]:
    """A request whose last chunk tells how many tokens there were."""
    return {
        "prompt": list(ids),
        "max_tokens": task.tokens,
        "temperature": task.temperature,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def read_stream(stream: bytes) -> Answer:
    """A whole stream of server-sent events.

    Raises:
        RuntimeError: it broke off, or it tells an error.
    """
    reader = StreamReader()
    reader.feed(stream, 0.0)
    if reader.failure is not None:
        kind, said = reader.failure
        raise RuntimeError(f"{kind}: {said}; it ends with {stream[-200:]!r}")
    if reader.output_tokens is None:
        raise RuntimeError(f"a stream without usage; it ends with {stream[-200:]!r}")
    return Answer(reader.digest, reader.output_tokens, {} if reader.drafts is None else reader.drafts.by_drafter)


def _checked_tokens(name: str, task: Task, answers: Sequence[Answer]) -> int:
    lengths = [answer.tokens for answer in answers]
    if lengths != [task.tokens] * len(task.cases):
        raise RuntimeError(f"{name} made {lengths} tokens where {task.tokens} were asked for, of each prompt")
    return sum(lengths)


def _added(many: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for of_answer in many:
        for drafter, counts in of_answer.items():
            mine = total.setdefault(drafter, dict.fromkeys(counts, 0))
            for what, count in counts.items():
                mine[what] += count
    return total
