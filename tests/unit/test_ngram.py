"""The n-gram drafter's kernel against its definition."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from decoding.drafters.base import DrafterContext
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence

CONTEXT = DrafterContext(
    name="ngram",
    bit=2,
    target=cast(Any, None),
    tokenizer=cast(Any, None),
    dtype=torch.float32,
    device=torch.device("cpu"),
    attention="auto",
    max_model_len=4096,
    max_step_tokens=64,
    target_folder=Path("."),
)


def plan_of(texts: list[list[int]]) -> Plan:
    rows = []
    for number, text in enumerate(texts):
        sequence = Sequence(GenerateRequest(str(number), tuple(text), SamplingParams(max_tokens=8)), 0, 1)
        rows.append(PlannedRow(sequence, len(text) - 1, 1))
    return Plan(tuple(rows), tuple(rows))


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_finds_what_the_definition_finds(seed: int) -> None:
    luck = random.Random(seed)
    words = luck.choice([1, 2, 5, 50])
    texts = [[luck.randrange(words) for _ in range(luck.choice([1, 2, 3, 40, 200]))] for _ in range(luck.randint(1, 4))]
    most = luck.randint(1, 6)
    options = NgramOptions(max_match=most, min_match=luck.randint(1, most), branches=luck.randint(1, 4))
    drafter = NgramDrafter(options, CONTEXT)
    limits = [
        RowQuota(
            luck.choice([0, 1, 5, 24]), luck.randint(1, 8), frozenset(luck.choice([["ngram"], ["ngram", "x"], []]))
        )
        for _ in texts
    ]
    plan, quota = plan_of(texts), Quota(tuple(limits))
    trees, expected = drafter.propose(plan, quota, cast(Any, None)), drafter.search_anywhere(plan, quota)
    assert (trees is None) == (expected is None)
    if trees is not None and expected is not None:
        trees.validate()
        for name in ("tokens", "parents", "confidence", "source"):
            assert torch.equal(getattr(trees, name), getattr(expected, name)), name
        assert set(trees.source.unique().tolist()) <= {0, 4}
