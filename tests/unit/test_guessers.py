"""Which drafters without a model are asked in light steps: those that earn their time."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import torch

from decoding.costs import EDGES, CostModel, CostTable, DraftPrice
from decoding.drafters.base import Needs
from decoding.guessers import LIGHT_LOOK, Guessers
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.proposal_ops import TorchProposalOps
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models.tree import NO_PARENT, Trees

STEP = 1e-3  # seconds
NAMES = ("first", "second")


class Steps:
    """Light steps of one row, with two drafters whose price is a twentieth of a step."""

    def __init__(self) -> None:
        price = DraftPrice(first=STEP / 20)
        table = CostTable(
            EDGES, tuple(STEP * (1 + 0.02 * (t - 1)) for t in EDGES), 0.0, 0.0, dict.fromkeys(NAMES, price)
        )
        drafters = [SimpleNamespace(name=name, needs=Needs(host=True)) for name in NAMES]
        self.guessers = Guessers(cast(Any, drafters), CostModel(table), TorchProposalOps(), 4)
        sequence = Sequence(GenerateRequest("r", (1, 2), SamplingParams(max_tokens=8)), 0, 1)
        row = PlannedRow(sequence, 1, 1)
        self.plan, self.limits = Plan((row,), (row,)), Quota((RowQuota(8, 4, frozenset(NAMES)),))

    def run(self, steps: int, useful: set[str]) -> dict[str, float]:
        """How often each was asked; the useful ones guess a chain that mostly comes, the others nothing."""
        asked = dict.fromkeys(NAMES, 0)
        for _ in range(steps):
            quota = self.guessers.ask_lightly(self.limits, 1)
            names = self.guessers.asked(quota)
            guesses = {bit: chain(1 << bit) for bit, name in enumerate(NAMES) if name in names & useful}
            self.guessers.judge_lightly(self.plan, guesses, quota, 0.05)
            self.guessers.save(0.005 * STEP)
            for name in names:
                asked[name] += 1
        return {name: count / steps for name, count in asked.items()}


def chain(source: int) -> Trees:
    return Trees(
        torch.tensor([[2, 3, 4, 5]]),
        torch.tensor([[NO_PARENT, 0, 1, 2]]),
        torch.tensor([[1.0, 0.9, 0.9, 0.9]]),
        torch.tensor([[0, source, source, source]]),
    )


def test_who_earns_nothing_rests_and_is_tried_for_a_known_share_of_the_time() -> None:
    steps = Steps()
    steps.run(1000, {"first"})
    asked = steps.run(2000, {"first"})
    assert asked["first"] == 1
    assert 0 < asked["second"] / 20 <= 0.006, "half a percent of the time"


def test_who_becomes_useful_is_found_and_who_turns_useless_is_given_up() -> None:
    steps = Steps()
    steps.run(1000, {"first"})
    steps.run(200, {"second"})
    asked = steps.run(200, {"second"})
    assert asked["second"] == 1
    assert asked["first"] < 0.3


def test_it_is_decided_once_in_some_steps() -> None:
    steps = Steps()
    steps.run(1000, set())
    turns = [steps.run(1, set())["second"] for _ in range(40 * LIGHT_LOOK)]
    changes = [number for number, (a, b) in enumerate(itertools.pairwise(turns), 1) if a != b]
    assert changes
    assert len({number % LIGHT_LOOK for number in changes}) == 1


def test_a_look_that_had_no_rows_sends_nobody_to_rest() -> None:
    steps = Steps()
    steps.run(LIGHT_LOOK - 1, set(NAMES))
    steps.guessers.ask_lightly(Quota((RowQuota(),)), 1)
    assert steps.run(1, set(NAMES)) == dict.fromkeys(NAMES, 1.0)
