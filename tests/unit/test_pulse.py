"""The clock behind the planner: which gear is kept, and how rarely the others are tried."""

from __future__ import annotations

import pytest

from decoding.pulse import FULL, LIGHT, PLAIN, Beat


def run(beat: Beat, steps: int, rates: dict[int, float], unseen: int = 0) -> dict[int, int]:
    """How often each gear was chosen; every ``unseen``-th step has a chunk of a prompt and teaches nothing."""
    chosen = {PLAIN: 0, LIGHT: 0, FULL: 0}
    for number in range(1, steps + 1):
        gear = beat.next()
        chosen[gear] += 1
        if not unseen or number % unseen:
            beat.saw(gear, 1, 1 / rates[gear])
    return chosen


@pytest.mark.parametrize("unseen", [0, 2, 3])
@pytest.mark.parametrize("best", [PLAIN, LIGHT, FULL])
def test_the_best_gear_is_found_and_the_others_are_tried_ever_more_rarely(best: int, unseen: int) -> None:
    rates = {gear: 2.0 if gear == best else 1.0 for gear in (PLAIN, LIGHT, FULL)}
    beat = Beat((PLAIN, LIGHT, FULL))
    run(beat, 2000, rates, unseen)
    assert beat.current == best
    assert run(beat, 4000, rates, unseen)[best] > 0.98 * 4000


def test_a_gear_that_becomes_better_is_found() -> None:
    beat = Beat((PLAIN, FULL))
    run(beat, 2000, {PLAIN: 2.0, LIGHT: 1.0, FULL: 1.0})
    run(beat, 12000, {PLAIN: 2.0, LIGHT: 1.0, FULL: 6.0})
    assert beat.current == FULL


@pytest.mark.parametrize(("charged", "best"), [(0.0, FULL), (0.05, FULL), (0.3, PLAIN)])
def test_what_drafts_need_between_the_steps_is_in_their_account(charged: float, best: int) -> None:
    """A full step makes 1.2 times what a plain one does."""
    beat = Beat((PLAIN, FULL))
    for _ in range(1000):
        gear = beat.next()
        beat.charge(charged)
        beat.saw(gear, 1, 1.0 if gear == PLAIN else 1 / 1.2)
        if beat.current != FULL:
            break
    assert beat.current == best


@pytest.mark.parametrize("rates", [{PLAIN: 1.01, FULL: 1.0, LIGHT: 1.0}, {PLAIN: 1.0, FULL: 1.01, LIGHT: 1.0}])
def test_a_draw_changes_no_gear(rates: dict[int, float]) -> None:
    """A try is short and times are noisy: whoever changes for a draw is soon in the slower one, and stays for long."""
    beat = Beat((PLAIN, FULL))
    began = beat.current
    run(beat, 2000, rates)
    assert beat.current == began
