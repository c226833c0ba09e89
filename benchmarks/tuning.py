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
HOPELESS = 1.5  # times the best: a setting that needs more is not tried to its end, nor again
_WARM_UP_TOKENS = 16


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

    All settings run twice, one after the other, since not all may fit in memory together; what counts is the better
    time of each prompt. The best three then take turns for three rounds, so that a machine whose speed drifts is slow
    for all of them alike.

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
    if len(systems_by_setting) == 1:
        (start,) = systems_by_setting.values()
        return start()
    seconds: dict[str, float] = {}
    for setting, begin in systems_by_setting.items():
        seconds[setting] = _tried_alone(begin, trial, HOPELESS * min(seconds.values(), default=math.inf))
    _say("the better of two runs", seconds, trial)
    ranked = sorted(seconds, key=lambda setting: seconds[setting])[:FINALISTS]
    good = [setting for setting in ranked if seconds[setting] <= HOPELESS * seconds[ranked[0]]]
    return _final({setting: systems_by_setting[setting] for setting in good}, trial)


def _tried_alone(start: Callable[[], S], trial: Trial, limit: float) -> float:
    system = start()
    try:
        _warm_up(system, trial)
        return _seconds(system, trial, 0, times=2, limit=limit)
    finally:
        system.close()


def _final(starts: Mapping[str, Callable[[], S]], trial: Trial) -> S:
    running: dict[str, S] = {}
    best: str | None = None
    try:
        for setting, start in starts.items():
            running[setting] = start()
            _warm_up(running[setting], trial)
        best = _fastest(running, trial)
        return running[best]
    finally:
        for setting, system in running.items():
            if setting != best:
                system.close()


def _fastest(running: Mapping[str, Tunable], trial: Trial) -> str:
    times: dict[str, list[float]] = {setting: [] for setting in running}
    for number in range(FINAL_ROUNDS if len(running) > 1 else 0):
        for setting in sorted(running, reverse=bool(number % 2)):
            times[setting].append(_seconds(running[setting], trial, number))
    medians = {setting: statistics.median(of_setting or [0.0]) for setting, of_setting in times.items()}
    if len(running) > 1:
        _say(f"in turns, {FINAL_ROUNDS} rounds", medians, trial)
    return min(medians, key=lambda setting: medians[setting])


def _warm_up(system: Tunable, trial: Trial) -> None:
    tokens = min(trial.tokens, _WARM_UP_TOKENS)
    system.run(Task(-1, trial.temperature, (trial.cases[0],) * system.batch, tokens))


def _seconds(system: Tunable, trial: Trial, number: int, *, times: int = 1, limit: float = math.inf) -> float:
    """For all prompts of the trial, the best of ``times`` runs each; infinite as soon as it is more than ``limit``."""
    total = 0.0
    for _, filled in groups(trial.cases, system.batch):
        task = Task(number, trial.temperature, filled, trial.tokens)
        total += min(system.run(task).seconds for _ in range(times))
        if total > limit:
            return math.inf
    return total


def _say(how: str, seconds: Mapping[str, float], trial: Trial) -> None:
    ranked = sorted(seconds, key=lambda setting: seconds[setting])
    tried = [f"  {_shown(seconds[setting]):>9}  {setting or 'as it comes'}" for setting in ranked]
    print("\n".join([f"tried at temperature {trial.temperature:g}, {how}:", *tried]), file=sys.stderr)


def _shown(seconds: float) -> str:
    return f"{seconds:.3f} s" if math.isfinite(seconds) else "given up"
