"""What a step's time is made of: one tiny run with drafters that keep something from step to step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import overhead

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("system", ["plain", "ngram", "suffix", "lookahead"])
def test_steps_of_drafters_that_keep_something_are_run_again(system: str) -> None:
    words = ["--family", str(ROOT / "demo"), "--systems", system, "--batches", "2", "--temperatures", "0.8"]
    options = overhead.parse([*words, "--steps", "3", "--rounds", "2", "--prompt-tokens", "40"])
    [share] = overhead.shares(options)
    assert (share.system, share.batch) == (system, 2)
    assert share.target > 0
    assert share.step > 0  # which of the two is longer is a matter of the clock, in three steps on a busy machine
    assert (share.drafting > 0) == (system != "plain")
    assert share.calls > 10
    assert system in overhead.render([share])


def test_what_guessers_do_is_clocked_and_not_called_again() -> None:
    ticks = iter(range(100))
    recorder = overhead.Recorder(lambda: float(next(ticks)))
    add = recorder.named(overhead.GUESSING, lambda x: x + 1)
    with recorder:
        x = torch.zeros(2)
        add(x)
        torch.mul(x, 2)
    assert [call.part for call in recorder.calls] == [overhead.OTHER] * 2
    assert (recorder.count, recorder.seconds, recorder.guessing) == (3, 3.0, 1.0)
