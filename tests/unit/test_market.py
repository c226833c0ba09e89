"""The market's kernel and the judge's against their definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from decoding.calibration import MODES, Calibration
from decoding.costs import EDGES, LARGEST, CostModel, CostTable
from decoding.drafters.team import Proposal
from decoding.forecast import Forecast
from decoding.history import Record, judge_anywhere, judge_fused
from decoding.market import UNABLE, CpuMarket, Scene, Terms, weigh_anywhere
from decoding.plan import Plan, PlannedRow
from decoding.proposal_ops import CoverageTable, TorchProposalOps
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models import kernels
from tests.contract.test_tree_ops import random_trees

DEPTH = 5


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_makes_the_deal_of_the_definition(seed: int) -> None:
    luck, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, drafters = luck.choice([1, 2, 9]), 3
    slots = torch.randperm(12, generator=generator)[:rows]
    table = CoverageTable(
        torch.rand(12, drafters, DEPTH, generator=generator, dtype=torch.float64),
        torch.rand(len(MODES), drafters, DEPTH, generator=generator, dtype=torch.float64),
        3 * torch.rand(drafters, DEPTH, generator=generator, dtype=torch.float64),
    )
    dearness = luck.choice([0.0, 0.05, 2.0])
    costs = CostModel(CostTable(EDGES, tuple(1 + dearness * (edge - 1) for edge in EDGES)))
    guesses = [random_trees(rows, luck.choice([1, 6, 20]), 9, "bushy", generator) for _ in range(luck.randint(0, 2))]
    scene = Scene(guesses, luck.choice([0.0, 0.1]), slots, table, costs.steps(), rows + luck.choice([0, 300]), 0.1)
    price = luck.choice([0.01, 0.2, 5.0])
    terms = [
        Terms(
            bit=bit,
            first=price * luck.random(),
            row=price * luck.random() / 8,
            further=price * luck.random(),
            further_row=price * luck.random() / 8,
            trust=luck.uniform(0.3, 1.5),
            deepest=luck.randint(0, DEPTH),
            late=[luck.choice([0.0, 0.0, luck.random() / 9, UNABLE]) for _ in range(rows)],
        )
        for bit in range(luck.randint(0, drafters))
    ]
    ours, theirs = CpuMarket()(scene, terms), weigh_anywhere(scene, terms)
    assert (ours.member, ours.depth, ours.rows) == (theirs.member, theirs.depth, theirs.rows)
    for name in ("parts", "guessed", "held", "gain", "rate"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)


def test_prices_reach_as_far_as_any_step() -> None:
    costs = CostModel(CostTable((1, 4), (1.0, 2.5)))
    assert costs.at(1) == pytest.approx(1.0)
    assert costs.at(3) == pytest.approx(2.0)
    assert costs.at(104) == pytest.approx(52.5)  # along the last slope
    assert costs.at(10 * LARGEST) == costs.at(LARGEST)
    larger = CostModel(CostTable((1, 4), (1.0, 2.5)), 10 * LARGEST)
    assert larger.at(10 * LARGEST) == pytest.approx(0.5 + 5 * LARGEST)
    assert larger.steps()[: LARGEST + 1].tolist() == costs.steps().tolist()


def test_long_chunks_of_prompts_do_not_make_short_steps_dear() -> None:
    """A step of four times the tokens that takes four times as long is no news."""
    table = CostTable((1, 4), (1.0, 2.5))
    costs = CostModel(table, 4 * LARGEST)
    for _ in range(200):
        costs.learn_step(4 * LARGEST, 1, 0, 0.5 + 2 * LARGEST)
    assert costs.moved == pytest.approx(0.0, abs=1e-6)
    assert costs.at(4) == pytest.approx(2.5, rel=1e-3)


def sequence(number: int, text: list[int], given: int) -> Sequence:
    made = Sequence(GenerateRequest(f"r{number}", tuple(text[:given]), SamplingParams(max_tokens=len(text))), 0, 1)
    for token in text[given:]:
        made.append(token)
    return made


@pytest.mark.skipif(not kernels.load(), reason="compares with the kernels")
@pytest.mark.parametrize("seed", range(30))
def test_the_judges_agree(seed: int) -> None:
    luck, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = luck.choice([1, 3, 7])
    sequences = [sequence(i, [luck.randrange(3) for _ in range(30)], 20 + luck.randrange(10)) for i in range(rows)]
    plan = Plan((), tuple(PlannedRow(s, s.length - 1, 1) for s in sequences))
    lengths = [luck.choice([20, 27, 30]) for _ in sequences]
    ops = TorchProposalOps()
    pairs = []
    for _ in range(2):
        calibration, forecast = Calibration(2, ops), Forecast(2, DEPTH, ops)
        for number, each in enumerate(sequences):
            if number % 3 != 2:  # the others have ended
                forecast.join(each.id, number % 2)
        pairs.append((calibration, forecast))
    modes = torch.tensor([luck.randrange(len(MODES)) for _ in sequences])
    record = Record(plan, lengths, modes, 0)
    for bit in (1, 0, 1):
        trees = random_trees(rows, luck.choice([1, 9, 40]), 3, "deep", generator)
        record.bits.append(bit)
        record.made.append(Proposal(bit, trees).trees)
        record.calibrated.append(trees.confidence**0.5)
    judge_fused(record, *pairs[0], 0.1)
    judge_anywhere(record, *pairs[1], 0.1)
    for bit in (0, 1):
        ours, theirs = (calibration.tally(bit) for calibration, _ in pairs)
        for name in ("hits", "trials", "surprise"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-9)
    for name in ("chances", "common", "widths"):
        ours, theirs = (getattr(forecast.table, name) for _, forecast in pairs)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
