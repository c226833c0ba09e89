"""Counting the texts that rounding changed."""

from __future__ import annotations

import pytest

from benchmarks.flips import compare


def test_a_text_counts_up_to_its_first_other_token() -> None:
    reference = {"a": (1, 2, 3, 4), "b": (5, 6, 7, 8), "c": (9, 9)}
    flips = compare({"a": (1, 2, 3, 4), "b": (5, 0, 7, 0), "c": (9,)}, reference)
    assert (flips.texts, flips.differing, flips.tokens) == (3, 2, 4 + 2 + 2)
    assert flips.per_thousand == pytest.approx(1000 * 2 / 8)
    assert compare(reference, reference).per_thousand == 0


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        compare({"a": (1,)}, {"b": (1,)})
