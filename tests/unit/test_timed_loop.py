"""Requests that come by the clock: when they are let in, what they waited for, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.first_token import Place, arrivals, line, parse, places, requests_of, summary
from benchmarks.settings import AUTO, PLAIN
from benchmarks.timed_loop import CpuClock, First, Pass, closed_loop, open_loop
from decoding.messages import EngineStats, TokenEvent
from decoding.request import GenerateRequest, SamplingParams


class FakeClock:
    """Seconds that pass when an engine says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def idle_until(self, moment: float) -> None:
        self.now = max(self.now, moment)


class FakeEngine:
    """A step drafts for a second, takes whoever has come by then, and runs for another; each row makes a token."""

    def __init__(self, clock: FakeClock) -> None:
        self.most = 0
        self._clock = clock
        self._left: dict[str, int] = {}
        self._parts = {"drafters": 0.0, "forward": 0.0}

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def submit(self, request: GenerateRequest) -> None:
        self._left[request.request_id] = request.params.max_tokens
        self.most = max(self.most, len(self._left))

    def step(self, arrivals: Callable[[], None] | None = None) -> list[TokenEvent]:
        assert arrivals is not None
        self._pass("drafters")
        arrivals()
        self._pass("forward")
        events = []
        for name, left in list(self._left.items()):
            events.append(TokenEvent(name, 0, (left,), finish_reason="length" if left == 1 else None))
            self._left[name] = left - 1
            if left == 1:
                del self._left[name]
        return events

    def stats(self) -> EngineStats:
        return EngineStats(part_seconds=dict(self._parts), step_nodes=int(self._parts["drafters"]))

    def _pass(self, part: str) -> None:
        self._clock.now += 1.0
        self._parts[part] += 1.0


def asked(*tokens: int) -> list[GenerateRequest]:
    return [GenerateRequest(f"r{i}", (1,), SamplingParams(count)) for i, count in enumerate(tokens)]


def test_a_closed_loop_replaces_who_ends_after_the_pause() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock)
    found = closed_loop(engine, asked(3, 2, 1, 1), streams=2, pause=0.5, clock=clock)
    assert engine.most == 2
    assert found.tokens == 7
    # r2 comes half a second after the end of r1 and is let in when that step has drafted; r3 finds nobody there
    assert [first.waited for first in found.firsts] == [0.0, 0.0, 0.5, 0.0]
    assert [first.parts["drafters"] for first in found.firsts] == [1.0, 1.0, 0.0, 1.0]
    assert [first.parts["forward"] for first in found.firsts] == [1.0] * 4
    assert [first.ttft for first in found.firsts] == [2.0, 2.0, 1.5, 2.0]
    assert all(first.rest == pytest.approx(0.0) for first in found.firsts)


def test_an_open_loop_waits_for_nobody_and_lets_time_pass() -> None:
    clock = FakeClock()
    found = open_loop(FakeEngine(clock), asked(2, 2, 1), [0.0, 2.25, 50.0], clock)
    assert [first.waited for first in found.firsts] == [0.0, 0.75, 0.0]
    assert [first.nodes for first in found.firsts] == [1, 0, 1]
    assert found.seconds == 52.0


def test_the_clock_of_a_process_counts_what_it_only_waits_for() -> None:
    clock = CpuClock()
    before = clock()
    clock.idle_until(before + 1000.0)
    clock.idle_until(before + 10.0)
    assert before + 1000.0 <= clock() < before + 1100.0


def test_rounds_have_other_requests_and_both_systems_the_same() -> None:
    options = parse(["--tokens", "10", "--requests", "3"])
    place, ids = Place("open", 8, 16, 0.0), list(range(500))
    one, again, other = (requests_of(place, number, ids, options) for number in (0, 0, 1))
    assert one == again != other
    assert len(one) == 24
    assert {len(request.prompt_ids) for request in one} == {16}
    assert {request.params.max_tokens for request in one} > {6, 14}
    times = arrivals(0, 1000, 4.0)
    assert times == sorted(times) == arrivals(0, 1000, 4.0)
    assert times[-1] == pytest.approx(250, rel=0.2)


def test_every_place_is_measured_the_loop_that_knows_the_load_first() -> None:
    options = parse(["--streams", "1", "2", "--prompt-lengths", "16"])
    found = [(place.streams, place.loop) for place in places(options)]
    assert found == [(streams, loop) for streams in (1, 2) for loop in ("closed", "open")]


def test_ratios_are_of_medians_within_a_round() -> None:
    def made(*times: float, tokens: int = 10, text: str = "x") -> Pass:
        parts = {"drafters": 0.1, "planner": 0.1, "forward": 0.2}
        return Pass(tuple(First("r", 0.3, parts, 4, ttft) for ttft in times), tokens, 1.0, (text,))

    rounds = [{PLAIN: made(9.0, 1.0, 2.0, 3.0), AUTO: made(9.0, 1.0, 3.0, 9.0, tokens=20)}]
    rounds += [{PLAIN: made(9.0, 2.0, 2.0, 2.0), AUTO: made(9.0, 1.0, 1.0, 1.0, tokens=30)}]
    found = summary(rounds, Place("closed", 1, 16, 0.0))
    assert found["ttft"] == [1.0, 0.5, 1.5], "without the first ones, who came all at once"
    assert found["rate"] == [2.5, 2.0, 3.0]
    assert found["ms"][AUTO]["drafting"] == pytest.approx(200.0)
    assert found["ms"][PLAIN]["ttft"] == pytest.approx(2000.0)
    assert found["requests"] == 6
    piece = {"loop": "closed", "streams": 1, "prompt_length": 16, "temperature": 0.0, **found}
    assert "1.000 [0.500, 1.500]" in line(piece)
    assert line({**piece, "same_text": False}).endswith("OTHER TEXT")
