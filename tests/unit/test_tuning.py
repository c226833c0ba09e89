"""Settings are tried, the best one is kept running, all others are closed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.measure import Case, Run, Task
from benchmarks.tuning import FINALISTS, Trial, tune

CASES = tuple(Case(index, (1, 2, 3), seed=index) for index in range(3))
TRIAL = Trial(CASES, tokens=40, temperature=1.0)


class Fake:
    """A system whose time is known."""

    name = "fake"
    peer = True

    def __init__(self, log: list[Fake], setting: str, times: list[float], batch: int = 1) -> None:
        self.setting = setting
        self.batch = batch
        self.closed = 0
        self.tasks: list[Task] = []
        self._times = times
        log.append(self)

    def run(self, task: Task) -> Run:
        self.tasks.append(task)
        seconds = self._times[0] if len(self._times) == 1 else self._times.pop(0)
        return Run("fake", task.round, task.temperature, (0,), seconds, 40, 40, ("",))

    def close(self) -> None:
        self.closed += 1


def starts(log: list[Fake], seconds: dict[str, list[float]], batch: int = 1) -> dict[str, Callable[[], Fake]]:
    return {setting: partial(Fake, log, setting, times, batch) for setting, times in seconds.items()}


def test_the_fastest_stays_and_the_others_are_closed() -> None:
    log: list[Fake] = []
    best = tune(starts(log, {"slow": [1.3], "fast": [1.0], "middle": [1.1], "other": [1.2]}), TRIAL)
    assert best.setting == "fast"
    assert [system.closed for system in log if system is not best] == [1] * (len(log) - 1)
    assert best.closed == 0
    assert len(log) == 4 + FINALISTS


def test_a_hopeless_setting_is_given_up_and_no_finalist() -> None:
    log: list[Fake] = []
    tune(starts(log, {"fast": [1.0], "hopeless": [99.0], "near": [1.2]}), TRIAL)
    (hopeless,) = (system for system in log if system.setting == "hopeless")
    assert len(hopeless.tasks) == 3  # its warm-up, and one prompt twice


def test_one_stall_does_not_decide() -> None:
    log: list[Fake] = []
    stalls = [1.0, 50.0, 1.0, 1.0]  # the warm-up, then the first prompt's first run
    best = tune(starts(log, {"steady": [1.1], "stalls": stalls}), TRIAL)
    assert best.setting == "stalls"


def test_what_is_tried_is_what_the_trial_says() -> None:
    log: list[Fake] = []
    tune(starts(log, {"one": [1.0], "two": [1.0]}, batch=2), TRIAL)
    for system in log:
        warm, *tried = system.tasks
        assert warm.tokens < 40
        assert {task.tokens for task in tried} == {40}
        assert {task.temperature for task in system.tasks} == {1.0}
        assert {len(task.cases) for task in system.tasks} == {2}
        assert {case.index for task in tried for case in task.cases} == {0, 1, 2}


def test_a_single_setting_is_not_tried() -> None:
    log: list[Fake] = []
    assert tune(starts(log, {"only": [1.0]}), CASES).tasks == []


def test_a_failure_leaves_nothing_running() -> None:
    log: list[Fake] = []

    def broken() -> Fake:
        raise RuntimeError("does not start")

    with pytest.raises(RuntimeError, match="does not start"):
        tune({**starts(log, {"good": [1.0]}), "bad": broken}, TRIAL)
    assert [system.closed for system in log] == [1]


@pytest.mark.parametrize(("settings", "trial"), [({}, TRIAL), (None, Trial(()))])
def test_nothing_to_try_is_an_error(settings: dict[str, Callable[[], Fake]] | None, trial: Trial) -> None:
    given = starts([], {"a": [1.0]}) if settings is None else settings
    with pytest.raises(ValueError, match="at least one setting and one prompt"):
        tune(given, trial)
