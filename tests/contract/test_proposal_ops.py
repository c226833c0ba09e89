"""Every set of proposal operations against TorchProposalOps, and what the definition itself must do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.proposal_ops import (
    FIRST_KNOT,
    KNOTS,
    PROPOSAL_OPS,
    ProposalOps,
    Tally,
    TorchProposalOps,
    load_proposal_ops,
)
from models.tree import NO_PARENT, Trees
from tests.contract.test_tree_ops import CPU, random_trees

MODES, DEPTHS = 3, 4
DEFINITION = TorchProposalOps()


@pytest.fixture(scope="module", params=[name for name in PROPOSAL_OPS if name != "torch"])
def ops(request: pytest.FixtureRequest) -> ProposalOps:
    return load_proposal_ops(CPU, request.param)


def empty_tally() -> Tally:
    return Tally(
        torch.zeros(MODES, DEPTHS, KNOTS, dtype=torch.float64),
        torch.zeros(MODES, DEPTHS, KNOTS, dtype=torch.float64),
        torch.zeros(MODES, DEPTHS, 2, dtype=torch.float64),
    )


def identity() -> torch.Tensor:
    odds = torch.arange(KNOTS, dtype=torch.float64) + FIRST_KNOT
    return odds.sigmoid().expand(MODES, DEPTHS, KNOTS).contiguous()


@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([1, 2, 9, 40, 70]), st.sampled_from([0.0, 0.05, 0.4]))
@settings(max_examples=100, deadline=None)
def test_the_same_as_the_definition(ops: ProposalOps, seed: int, rows: int, width: int, floor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    trees = random_trees(rows, width, 3, "deep", generator)
    mode = torch.randint(MODES, (rows,), generator=generator)
    curves = torch.rand(MODES, DEPTHS, KNOTS, generator=generator, dtype=torch.float64).cumsum(-1) / KNOTS
    ours, theirs = ops.recalibrate(trees, mode, curves), DEFINITION.recalibrate(trees, mode, curves)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    text = torch.randint(3, (rows, 6), generator=generator)
    text[0, 3:] = -1
    tallies = empty_tally(), empty_tally()
    scores = [each.score(trees, theirs, text, mode, floor, t) for each, t in zip((ops, DEFINITION), tallies)]
    for name in ("reach", "extent", "widths"):
        assert torch.equal(getattr(scores[0], name), getattr(scores[1], name)), name
    for name in ("hits", "trials", "surprise"):
        torch.testing.assert_close(getattr(tallies[0], name), getattr(tallies[1], name), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", list(PROPOSAL_OPS))
def test_what_is_counted(name: str) -> None:
    ops = load_proposal_ops(CPU, name)
    #  root -> a .7 (-> c .5 -> d .9), b .2; the text is a, x
    trees = Trees(
        torch.tensor([[9, 1, 2, 3, 4]]),
        torch.tensor([[NO_PARENT, 0, 0, 1, 3]]),
        torch.tensor([[1.0, 0.7, 0.2, 0.5, 0.9]]),
        torch.tensor([[0, 1, 1, 1, 1]]),
    )
    tally, mode = empty_tally(), torch.tensor([1])
    calibrated = ops.recalibrate(trees, mode, identity())
    torch.testing.assert_close(calibrated, trees.confidence, atol=0.02, rtol=0)
    scores = ops.score(trees, calibrated, torch.tensor([[1, 8]]), mode, 0.3, tally)
    assert (scores.reach.tolist(), scores.extent.tolist(), scores.widths.tolist()) == ([1], [3], [[1, 1]])
    assert tally.trials[1].sum(-1).tolist() == pytest.approx([2.0, 1.0, 0.0, 0.0])  # d's parent was not in the text
    assert tally.hits[1].sum(-1).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert tally.surprise[1, :, 1].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert float(tally.trials[0].sum() + tally.trials[2].sum()) == 0


@pytest.mark.parametrize("name", list(PROPOSAL_OPS))
@pytest.mark.parametrize(("right", "sign"), [(9, 1), (5, -1)])
def test_surprise_tells_which_way_tau_is_off(name: str, right: int, sign: int) -> None:
    """0.7 that comes true nine times in ten is too modest: tau must fall, and so on."""
    trees = Trees(
        torch.tensor([[9, 1]]), torch.tensor([[NO_PARENT, 0]]), torch.tensor([[1.0, 0.7]]), torch.tensor([[0, 1]])
    )
    tally, mode = empty_tally(), torch.zeros(1, dtype=torch.int64)
    ops = load_proposal_ops(CPU, name)
    for place in range(10):
        ops.score(trees, trees.confidence, torch.tensor([[1 if place < right else 2]]), mode, 0.0, tally)
    assert float(tally.surprise[0, 0, 0]) * sign > 0
