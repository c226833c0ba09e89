"""The closed loop: what is in flight, when its window opens and closes, what is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.closed_loop import Load, run_loop
from benchmarks.measure import Case
from decoding.messages import DrafterStats, EngineStats, TokenEvent
from decoding.request import GenerateRequest

CASES = [Case(index, (index + 1,), seed=10 + index) for index in range(5)]


class FakeEngine:
    """Every row makes ``pace(row)`` tokens a step; a step takes a second of its own clock."""

    def __init__(self, pace: Callable[[int], int] = lambda row: 1, silent: int = 0) -> None:
        self.open: dict[str, tuple[GenerateRequest, int]] = {}
        self.submitted: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.in_flight: list[int] = []
        self.steps = 0
        self._pace, self._silent = pace, silent

    def submit(self, request: GenerateRequest) -> None:
        self.submitted.append(request)
        self.open[request.request_id] = (request, 0)

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        self.in_flight.append(len(self.open))
        if self.steps <= self._silent:  # prompts are being computed
            return []
        events = []
        for row, (name, (request, made)) in enumerate(list(self.open.items())):
            count = min(self._pace(row), request.params.max_tokens - made)
            ends = made + count == request.params.max_tokens
            events.append(TokenEvent(name, 0, (7,) * count, finish_reason="length" if ends else None))
            self.open[name] = (request, made + count)
            if ends:
                del self.open[name]
        return events

    def cancel(self, request_id: str) -> list[TokenEvent]:
        self.cancelled.append(request_id)
        del self.open[request_id]
        return []

    def stats(self) -> EngineStats:
        n = self.steps
        by_drafter = {"ngram": DrafterStats(drafted=4 * n, accepted=2 * n)} if n else {}
        return EngineStats(
            steps=n,
            forward_seconds=0.5 * n,
            draft_seconds=0.1 * n,
            drafted=4 * n,
            accepted=2 * n,
            by_drafter=by_drafter,
        )

    def clock(self) -> float:
        return float(self.steps)


def load(**changes: object) -> Load:
    given: dict[str, object] = {"concurrency": 3, "temperature": 0.5, "tokens": 6, "window": 30, "limit": 1e9}
    return Load(**{**given, **changes})  # type: ignore[arg-type]


def test_as_many_requests_as_asked_for_are_always_in_flight() -> None:
    engine = FakeEngine(pace=lambda row: 1 + row)
    run_loop(engine, CASES, load(), engine.clock)
    assert set(engine.in_flight) == {3}
    assert not engine.open
    assert len(engine.cancelled) == 3


def test_the_window_opens_when_every_row_has_a_token_and_closes_on_its_number() -> None:
    engine = FakeEngine(silent=4)
    window = run_loop(engine, CASES, load(), engine.clock)
    assert (window.tokens, window.seconds, window.steps) == (30, 10.0, 10)
    assert window.rate == pytest.approx(3.0)
    assert engine.steps == 15


def test_counters_are_those_of_the_window() -> None:
    engine = FakeEngine()
    window = run_loop(engine, CASES, load(), engine.clock)
    assert (window.forward_seconds, window.draft_seconds) == (pytest.approx(5.0), pytest.approx(1.0))
    assert (window.drafted, window.accepted) == (40, 20)
    assert window.by_drafter == {"ngram": {"drafted": 40, "accepted": 20}}


def test_the_first_requests_end_one_after_the_other_and_the_others_are_whole() -> None:
    engine = FakeEngine()
    run_loop(engine, CASES, load(), engine.clock)
    assert [request.params.max_tokens for request in engine.submitted][:5] == [2, 4, 6, 6, 6]


def test_requests_follow_the_cases_round_and_round_with_their_own_seeds() -> None:
    engine = FakeEngine()
    run_loop(engine, CASES, load(first=4), engine.clock)
    assert [request.prompt_ids for request in engine.submitted][:3] == [(5,), (1,), (2,)]
    assert [request.params.seed for request in engine.submitted][:3] == [14, 10, 11]
    assert all(request.params.ignore_eos and request.params.temperature == 0.5 for request in engine.submitted)
    assert len({request.request_id for request in engine.submitted}) == len(engine.submitted)


def test_a_window_closes_after_its_limit_whatever_came_out() -> None:
    engine = FakeEngine()
    window = run_loop(engine, CASES, load(limit=4.0), engine.clock)
    assert (window.tokens, window.seconds) == (12, 4.0)
    assert run_loop(FakeEngine(), CASES, load(limit=0.0)).tokens == 3  # never nothing: rates are divided by


def test_one_request_at_a_time_makes_the_same_tokens_whatever_the_pace() -> None:
    slow, fast = FakeEngine(), FakeEngine(pace=lambda row: 3)
    windows = [run_loop(engine, CASES, load(concurrency=1), engine.clock) for engine in (slow, fast)]
    assert [window.tokens for window in windows] == [30, 30]
    assert windows[1].rate == pytest.approx(3 * windows[0].rate)
