"""Our engine as a system to be measured, in this process and without a server in between."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from benchmarks.measure import Case, Run, Task
from decoding.engine import Engine
from decoding.messages import EngineStats
from decoding.request import GenerateRequest, SamplingParams


class System(Protocol):
    """Something that continues prompts."""

    name: str
    batch: int  # prompts at once
    peer: bool  # another project's

    def run(self, task: Task) -> Run:
        """Do the task, timed.

        Raises:
            RuntimeError: it made another number of tokens than was asked for.
        """
        ...


class EngineSystem:
    """An engine; what its drafters are was decided when it was loaded. Several systems may share one."""

    peer = False

    def __init__(self, name: str, engine: Engine, batch: int = 1) -> None:
        self.name = name
        self.batch = batch
        self.engine = engine

    def run(self, task: Task) -> Run:
        before = self.engine.stats()
        started = time.perf_counter()
        outputs = self.complete(task)
        seconds = time.perf_counter() - started
        return _engine_run(self.name, task, outputs, seconds, before, self.engine.stats())

    def complete(self, task: Task) -> list[list[int]]:
        """The tokens of each text."""
        for place, case in enumerate(task.cases):
            self.engine.submit(self.request(str(place), case, task))
        made: dict[str, list[int]] = defaultdict(list)
        while self.engine.has_work:
            for event in self.engine.step():
                made[event.request_id].extend(event.token_ids)
        return [made[str(place)] for place in range(len(task.cases))]

    def request(self, name: str, case: Case, task: Task) -> GenerateRequest:
        """What is asked of the engine for one prompt of a task."""
        params = SamplingParams(max_tokens=task.tokens, temperature=task.temperature, seed=case.seed, ignore_eos=True)
        return GenerateRequest(name, case.ids, params)


def _engine_run(
    name: str, task: Task, outputs: Sequence[Sequence[int]], seconds: float, before: EngineStats, after: EngineStats
) -> Run:
    by_drafter = {}
    for drafter, count in after.by_drafter.items():
        old = before.by_drafter.get(drafter)
        by_drafter[drafter] = {
            "drafted": count.drafted - (old.drafted if old else 0),
            "accepted": count.accepted - (old.accepted if old else 0),
        }
    return Run(
        system=name,
        round=task.round,
        temperature=task.temperature,
        prompts=tuple(case.index for case in task.cases),
        seconds=seconds,
        tokens=checked_tokens(name, task, outputs),
        steps=after.steps - before.steps,
        texts=tuple(digest(ids) for ids in outputs),
        forward_seconds=after.forward_seconds - before.forward_seconds,
        draft_seconds=after.draft_seconds - before.draft_seconds,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        by_drafter=by_drafter,
    )


def checked_tokens(name: str, task: Task, outputs: Sequence[Sequence[int]]) -> int:
    """How many tokens were made; all systems must do the same work.

    Raises:
        RuntimeError: not what was asked for.
    """
    lengths = [len(ids) for ids in outputs]
    if lengths != [task.tokens] * len(task.cases):
        raise RuntimeError(f"{name} made {lengths} tokens where {task.tokens} were asked for, of each prompt")
    return sum(lengths)


def digest(ids: Sequence[int]) -> str:
    """Of a list of token ids, to compare texts by."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
