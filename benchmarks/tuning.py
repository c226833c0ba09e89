"""Finds the best setting of a system, on prompts that are not measured afterwards."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from benchmarks.measure import Case, Run, Task, groups

FINALISTS = 3
FINAL_ROUNDS = 3


class Tunable(Protocol):
    """A system that can be tried and thrown away."""

    name: str
    batch: int
    peer: bool
    setting: str  # what it was started with, for people to read

    def run(self, task: Task) -> Run: ...

    def close(self) -> None:
        """Give back its memory and end its processes."""
        ...


S = TypeVar("S", bound=Tunable)


@dataclass(frozen=True)
class Trial:
    """What settings are tried on: prompts that no measurement uses, at the temperature that will be measured."""

    cases: tuple[Case, ...]
    tokens: int = 64
    temperature: float = 0.0


def tune(systems_by_setting: Mapping[str, Callable[[], S]], trial: Trial | Sequence[Case]) -> S:
    """Start each setting, time it, and keep the best.

    All settings run once, one after the other, since not all may fit in memory together. The best three then take
    turns for three rounds, so that a machine whose speed drifts is slow for all of them alike.

    Args:
        systems_by_setting: a name for people -> what starts the system with that setting.

    Returns:
        The best one, running; all others are closed.

    Raises:
        ValueError: no settings, or no prompts.
    """
    trial = trial if isinstance(trial, Trial) else Trial(tuple(trial))
    if not systems_by_setting or not trial.cases:
        raise ValueError("tuning needs at least one setting and one prompt")
    finalists = list(systems_by_setting)
    if len(finalists) > FINALISTS:
        seconds = {setting: _tried_alone(start, trial) for setting, start in systems_by_setting.items()}
        finalists = sorted(seconds, key=lambda setting: seconds[setting])[:FINALISTS]
        _say(seconds, trial)
    return _final({setting: systems_by_setting[setting] for setting in finalists}, trial)


def _tried_alone(start: Callable[[], S], trial: Trial) -> float:
    system = start()
    try:
        _warm_up(system, trial)
        return _seconds(system, trial, 0)
    finally:
        system.close()


def _final(starts: Mapping[str, Callable[[], S]], trial: Trial) -> S:
    running: dict[str, S] = {}
    best = ""
    try:
        for setting, start in starts.items():
            running[setting] = start()
        if len(running) == 1:
            (best,) = running
            return running[best]
        for system in running.values():
            _warm_up(system, trial)
        times: dict[str, list[float]] = {setting: [] for setting in running}
        for number in range(FINAL_ROUNDS):
            for setting in sorted(running, reverse=bool(number % 2)):
                times[setting].append(_seconds(running[setting], trial, number))
        medians = {setting: statistics.median(of_setting) for setting, of_setting in times.items()}
        _say(medians, trial)
        best = min(medians, key=lambda setting: medians[setting])
        return running[best]
    finally:
        for setting, system in running.items():
            if setting != best:
                system.close()


def _warm_up(system: Tunable, trial: Trial) -> None:
    system.run(Task(-1, trial.temperature, (trial.cases[0],) * system.batch, trial.tokens))


def _seconds(system: Tunable, trial: Trial, number: int) -> float:
    tasks = [Task(number, trial.temperature, filled, trial.tokens) for _, filled in groups(trial.cases, system.batch)]
    return math.fsum(system.run(task).seconds for task in tasks)


def _say(seconds: Mapping[str, float], trial: Trial) -> None:
    ranked = sorted(seconds, key=lambda setting: seconds[setting])
    tried = ", ".join(f"{setting or 'as it comes'} {seconds[setting]:.3f} s" for setting in ranked)
    print(f"tuned at temperature {trial.temperature:g}: {tried}", file=sys.stderr)
