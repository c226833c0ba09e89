"""Figures and verdicts of the load-testing client."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.load import comparison
from benchmarks.load.comparison import compare, compare_texts, interval
from benchmarks.load.events import Drafts
from benchmarks.load.lag import Lag
from benchmarks.load.loops import Turn
from benchmarks.load.records import Record
from benchmarks.load.settings import Goal, Load
from benchmarks.load.summary import meets, summarise

GOOD = Record(
    prompt=0,
    scheduled=0.0,
    sent=0.5,
    ended=4.0,
    arrivals=(1.0, 2.0, 3.0),
    counts=(1, 2, 3),
    source="usage of each chunk",
    output_tokens=6,
    prompt_tokens=10,
    wanted=6,
    digest="a",
    finish_reason="length",
    drafts=None,
)


def turn(*records: Record, server: str = "A", number: int = 0, seconds: float = 4.0, lag: Lag | None = None) -> Turn:
    return Turn(server, Load(concurrency=1), number, records, 0.0, seconds, lag or Lag())


def test_the_table_of_student_is_right() -> None:
    table = comparison._FEW + comparison._MORE
    assert len(table) == 30
    assert np.allclose(table, stats.t.ppf(0.975, np.arange(1, 31)), atol=6e-4)


@pytest.mark.parametrize("rounds", [3, 6])
def test_intervals_hold_the_truth_as_often_as_they_say(rounds: int) -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        _, low, high = interval(rng.normal(math.log(1.2), 0.3, rounds).tolist())
        assert low is not None
        assert high is not None
        held += low <= 1.2 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_of_two_rounds_nothing_is_said() -> None:
    value, low, high = interval([0.1, 0.3])
    assert value == pytest.approx(math.exp(0.2))
    assert (low, high) == (None, None)


def later(record: Record, factor: float) -> Record:
    return replace(record, arrivals=tuple(factor * each for each in record.arrivals), ended=factor * record.ended)


def test_verdicts_follow_the_intervals() -> None:
    noise = (1.0, 1.05, 0.95, 1.02)
    a = [turn(later(GOOD, each), number=n) for n, each in enumerate(noise)]
    b = [turn(later(GOOD, 2 * each), server="B", number=n) for n, each in enumerate(reversed(noise))]
    ratios = {ratio.metric: ratio for ratio in compare(a, b)}
    assert ratios["TPOT (median)"].verdict == "slower"
    assert ratios["TPOT (median)"].value == pytest.approx(2.0)
    assert {ratio.verdict for ratio in compare(b, a) if ratio.metric != "output tokens/s"} == {"faster"}
    same = [turn(later(GOOD, each), server="B", number=n) for n, each in enumerate(reversed(noise))]
    assert {ratio.verdict for ratio in compare(a, same)} == {"no difference shown"}


def test_a_figure_that_one_server_lacks_is_not_compared() -> None:
    single = replace(GOOD, arrivals=(1.0,), counts=(6,))
    metrics = [ratio.metric for ratio in compare([turn(GOOD)], [turn(single, server="B")])]
    assert "TTFT (median)" in metrics
    assert "TPOT (median)" not in metrics


def test_texts_are_compared_prompt_by_prompt() -> None:
    a = turn(GOOD, replace(GOOD, prompt=1, digest="b"), replace(GOOD, prompt=2))
    b = turn(replace(GOOD, prompt=1, digest="c"), GOOD, replace(GOOD, prompt=2, error="timeout"), server="B")
    texts = compare_texts([a], [b])
    assert (texts.pairs, texts.same) == (2, 1)


def test_failed_requests_are_in_no_figure_but_the_errors() -> None:
    failed = replace(GOOD, error="truncated", arrivals=(100.0, 200.0), ended=300.0)
    summary = summarise([turn(GOOD, failed)], Goal(ttft=5000))
    assert (summary.requests, summary.succeeded, summary.errors) == (2, 1, {"truncated": 1})
    assert summary.ttft is not None
    assert summary.ttft.max == 1000.0
    assert summary.output_tokens == 6
    assert (summary.good_share, summary.good_rate) == (0.5, 0.25)


def test_only_what_came_within_the_window_counts() -> None:
    summary = summarise([turn(GOOD, seconds=2.0)], Goal())
    assert summary.output_rate == (1 + 2) / 2.0
    assert summary.request_rate == 0.0  # it ended after it
    assert summary.output_tokens == 6


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal(ttft=1000), True),
        (Goal(ttft=999), False),
        (Goal(tpot=400), True),
        (Goal(tpot=399), False),
        (Goal(e2el=4000), True),
        (Goal(ttft=1000, tpot=400, e2el=3999), False),
    ],
)
def test_every_target_must_be_met(goal: Goal, met: bool) -> None:
    assert meets(GOOD, goal) == met
    assert not meets(replace(GOOD, error="timeout"), goal)


def test_the_weakest_way_of_counting_is_told() -> None:
    weak = replace(GOOD, counts=None, source="usage of the last chunk")
    assert summarise([turn(GOOD, weak)], Goal()).source == "usage of the last chunk"


def test_speculation_is_added_up_and_steps_only_where_all_tell_them() -> None:
    told = replace(GOOD, drafts=Drafts(4, 2, 3, {"ngram": {"drafted": 4, "accepted": 2}}))
    both = summarise([turn(told, told)], Goal()).speculation
    assert both is not None
    assert (both.acceptance, both.tokens_per_step, both.by_drafter) == (0.5, 2.0, {"ngram": (8, 4)})
    half = summarise([turn(told, replace(GOOD, drafts=Drafts(4, 2, None)))], Goal()).speculation
    assert half is not None
    assert half.tokens_per_step is None


def test_a_client_that_was_too_slow_says_so() -> None:
    assert Lag([0.001] * 100, cpu=1.0, wall=10.0).warning([50.0]) is None
    busy = Lag([0.001] * 100, cpu=9.5, wall=10.0).warning([50.0])
    assert busy is not None
    assert "busy for 95%" in busy
    late = Lag([0.030] * 100, cpu=1.0, wall=10.0)
    assert late.warning([5000.0]) is None  # of times so long, 30 ms are nothing
    said = late.warning([50.0, 5000.0])
    assert said is not None
    assert "30 ms late" in said
