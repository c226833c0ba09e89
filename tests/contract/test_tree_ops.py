"""Every set of tree operations against TorchTreeOps: the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.batch import MAX_TREE
from models.tree import NO_PARENT, Trees
from models.tree_ops import TREE_OPS, ChosenTrees, DeviceTreeOps, TorchTreeOps, TreeOps, load_tree_ops

DEFINITION = TorchTreeOps()
CPU = torch.device("cpu")
EXACT = [name for name in TREE_OPS if name != "device"]  # know on the host how many nodes there are
OTHERS = [name for name in EXACT if name != "torch"]


@pytest.fixture(scope="module", params=OTHERS)
def ops(request: pytest.FixtureRequest) -> TreeOps:
    return load_tree_ops(CPU, request.param)


def random_trees(rows: int, width: int, tokens: int, shape: str, generator: torch.Generator, source: int = 0) -> Trees:
    """Trees whose siblings differ, with padding in between, and confidences with ties, zeros and ones."""
    trees = Trees(
        torch.full((rows, width), -1),
        torch.full((rows, width), NO_PARENT),
        torch.zeros(rows, width),
        torch.zeros(rows, width, dtype=torch.int64),
    )
    trees.tokens[:, 0], trees.confidence[:, 0] = 7, 1.0

    def integer(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    ties = [0.0, 0.25, 0.5, 1.0]
    for row in range(rows):
        there, taken = [0], set()
        for column in range(1, width):
            near = 1 + integer(2) if shape == "deep" else 1 + integer(len(there))
            parent = there[-min(near, len(there))] if shape != "flat" else 0
            token = integer(tokens)
            if integer(8) == 0 or (parent, token) in taken:
                continue
            taken.add((parent, token))
            there.append(column)
            trees.tokens[row, column], trees.parents[row, column] = token, parent
            exact = float(torch.rand((), generator=generator))
            trees.confidence[row, column] = ties[integer(4)] if integer(2) else exact
            trees.source[row, column] = 1 << (source + integer(3))
    trees.validate()
    return trees


def inherit(trees: Trees, spared: int) -> None:
    """A drafter that has proposed a node has proposed its ancestors: they get the node's sources in ``spared``."""
    for row in range(trees.num_rows):
        for column in range(trees.width - 1, 0, -1):
            parent = int(trees.parents[row, column])
            if parent > 0:
                trees.source[row, parent] |= trees.source[row, column] & spared


shapes = st.sampled_from(["deep", "bushy", "flat"])
widths = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130]))


@st.composite
def proposals(draw: st.DrawFn) -> list[Trees]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, tokens = draw(st.integers(1, 4)), draw(st.sampled_from([2, 3, 10, 1000]))
    return [
        random_trees(rows, draw(widths), tokens, draw(shapes), generator, source=2 * number)
        for number in range(draw(st.integers(1, 3)))
    ]


def assert_same(actual: ChosenTrees, expected: ChosenTrees) -> None:
    assert actual.counts == expected.counts
    assert actual.deepest == expected.deepest
    assert torch.equal(actual.masks, expected.masks)
    for name in ("tokens", "parents", "confidence", "source"):
        ours, theirs = getattr(actual.trees, name), getattr(expected.trees, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name


@given(proposals(), st.data())
@settings(max_examples=150, deadline=None)
def test_choose(ops: TreeOps, trees: list[Trees], data: st.DataObject) -> None:
    rows = trees[0].num_rows
    max_nodes = data.draw(st.lists(st.sampled_from([0, 1, 3, 8, 24, 63]), min_size=rows, max_size=rows))
    max_depth = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 63]), min_size=rows, max_size=rows))
    floor = data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    spared = data.draw(st.sampled_from([0, 2, 4, 6]))
    for proposal in trees:
        inherit(proposal, spared)
    chosen = ops.choose(trees, max_nodes, max_depth, floor, spared)
    assert_same(chosen, DEFINITION.choose(trees, max_nodes, max_depth, floor, spared))
    chosen.trees.validate()
    assert chosen.trees.width == max(chosen.counts)
    assert all(count <= 1 + most for count, most in zip(chosen.counts, max_nodes, strict=True))
    assert chosen.deepest <= max(max_depth)


@given(proposals(), st.data())
@settings(max_examples=150, deadline=None)
def test_choose_at_a_price(ops: TreeOps, trees: list[Trees], data: st.DataObject) -> None:
    rows = trees[0].num_rows
    max_nodes = data.draw(st.lists(st.sampled_from([0, 1, 3, 24, 63]), min_size=rows, max_size=rows))
    max_depth = data.draw(st.lists(st.sampled_from([1, 2, 63]), min_size=rows, max_size=rows))
    base, slope, stair = (data.draw(st.sampled_from(each)) for each in ([0.1, 1.0], [0.0, 0.05, 3.0], [1, 8]))
    price = base + slope * (torch.arange(sum(max_nodes) + 1, dtype=torch.float64) // stair)
    chosen = ops.choose(trees, max_nodes, max_depth, 0.0, 0, price)
    assert_same(chosen, DEFINITION.choose(trees, max_nodes, max_depth, 0.0, 0, price))
    chosen.trees.validate()
    if slope == 3.0 and stair == 1 and base == 0.1:
        assert chosen.counts == [1] * rows  # a node at thirty times the price of the step


@pytest.mark.parametrize("name", EXACT)
def test_nodes_are_bought_while_they_pay(name: str) -> None:
    chain = Trees(
        torch.tensor([[9, 1, 2, 3], [9, 4, 5, 6]]),
        torch.tensor([[NO_PARENT, 0, 1, 2]] * 2),
        torch.tensor([[1.0, 0.9, 0.9, 0.9], [1.0, 0.1, 0.9, 0.9]]),
        torch.tensor([[0, 1, 1, 1]] * 2),
    )
    ops = load_tree_ops(CPU, name)
    flat = torch.ones(7, dtype=torch.float64)
    assert ops.choose([chain], [3, 3], [8, 8], 0.0, 0, flat).counts == [4, 4]  # what costs nothing is taken
    dear = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.6, 1.9, 2.2], dtype=torch.float64)
    assert ops.choose([chain], [3, 3], [8, 8], 0.0, 0, dear).counts == [4, 1]  # 4.44 / 1.3 beats 4.54 / 1.6
    stairs = torch.tensor([1.0, 1.5, 1.5, 1.5, 1.5, 3.0, 3.0], dtype=torch.float64)
    assert ops.choose([chain], [3, 3], [8, 8], 0.0, 0, stairs).counts == [4, 2]  # up to the edge of a step
    ruinous = torch.tensor([1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0], dtype=torch.float64)
    assert ops.choose([chain], [3, 3], [8, 8], 0.0, 0, ruinous).counts == [1, 1]


@given(proposals(), st.data())
@settings(max_examples=100, deadline=None)
def test_choose_by_bounds(trees: list[Trees], data: st.DataObject) -> None:
    """Without waiting: the same nodes, then padding up to what was asked for, which can be embedded and seen."""
    rows = trees[0].num_rows
    max_nodes = data.draw(st.lists(st.sampled_from([0, 1, 3, 8, 24, 63]), min_size=rows, max_size=rows))
    max_depth = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 63]), min_size=rows, max_size=rows))
    floor = data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    chosen = DeviceTreeOps().choose(trees, max_nodes, max_depth, floor)
    exact = DEFINITION.choose(trees, max_nodes, max_depth, floor)
    assert all(most >= count for most, count in zip(chosen.counts, exact.counts, strict=True))
    assert all(count <= 1 + most for count, most in zip(chosen.counts, max_nodes, strict=True))
    assert exact.deepest <= chosen.deepest <= max(max_depth)
    width, bound = exact.trees.width, chosen.trees.width
    assert bound == max(chosen.counts)
    for name in ("parents", "confidence", "source"):
        ours = getattr(chosen.trees, name)
        assert torch.equal(ours[:, :width], getattr(exact.trees, name)), name
    assert not (chosen.trees.source[:, width:] != 0).any()
    there = (chosen.trees.parents != NO_PARENT) | (torch.arange(bound) == 0)
    tokens = chosen.trees.tokens
    assert torch.equal(tokens[:, :width][there[:, :width]], exact.trees.tokens[there[:, :width]])
    assert torch.equal(tokens[~there], tokens[:, :1].expand_as(tokens)[~there])
    assert torch.equal(chosen.masks[:, :width][there[:, :width]], exact.masks[there[:, :width]])
    padding = 1 | (1 << torch.arange(bound))
    assert torch.equal(chosen.masks[~there], padding.expand(rows, -1)[~there])


def draws(trees: Trees, counts: list[int], luck: Tensor) -> tuple[Tensor, Tensor]:
    """(drawn [W], first [S]): at each node the token of one of its children, or of none."""
    drawn = []
    for row, count in enumerate(counts):
        for column in range(count):
            children = trees.tokens[row][trees.parents[row] == column].tolist()
            choices = children * 5 + [-5]
            drawn.append(choices[int(luck[row, column]) % len(choices)])
    return torch.tensor(drawn), torch.tensor([0, *counts[:-1]]).cumsum(0)


@given(proposals(), st.integers(0, 2**32), st.sampled_from([0, 1, 4]))
@settings(max_examples=100, deadline=None)
def test_walk(ops: TreeOps, trees: list[Trees], seed: int, spare: int) -> None:
    rows = trees[0].num_rows
    chosen = DEFINITION.choose(trees, [63] * rows, [63] * rows, 0.0)
    luck = torch.randint(1000, (rows, 64), generator=torch.Generator().manual_seed(seed))
    drawn, first = draws(chosen.trees, chosen.counts, luck)
    arguments = (chosen.trees, chosen.masks, drawn, first, chosen.deepest + spare)
    for actual, expected in zip(ops.walk(*arguments), DEFINITION.walk(*arguments), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", EXACT)
def test_two_drafters_agree(name: str) -> None:
    """One drafter proposes 1 -> 2 and 3, the other 1 -> 4: the two 1s are one node of both; 3 is not worth a place."""
    one = Trees(
        torch.tensor([[9, 1, 3, 2]]),
        torch.tensor([[NO_PARENT, 0, 0, 1]]),
        torch.tensor([[1.0, 0.5, 0.25, 0.5]]),
        torch.tensor([[0, 1, 1, 1]]),
    )
    two = Trees(
        torch.tensor([[9, -1, 1, 4]]),
        torch.tensor([[NO_PARENT, NO_PARENT, 0, 2]]),
        torch.tensor([[1.0, 0.0, 0.75, 0.5]]),
        torch.tensor([[0, 0, 2, 2]]),
    )
    ops = load_tree_ops(CPU, name)
    chosen = ops.choose([one, two], [3], [9], 0.0)
    assert chosen.trees.tokens.tolist() == [[9, 1, 2, 4]]
    assert chosen.trees.parents.tolist() == [[NO_PARENT, 0, 1, 1]]
    assert chosen.trees.confidence.tolist() == [[1.0, 0.75, 0.5, 0.5]]
    assert chosen.trees.source.tolist() == [[0, 3, 1, 2]]
    assert chosen.masks.tolist() == [[1, 0b11, 0b111, 0b1011]]
    assert (chosen.counts, chosen.deepest) == ([4], 2)
    accepted, path, bonus, tokens = ops.walk(
        chosen.trees, chosen.masks, torch.tensor([1, 4, 8, 5]), torch.tensor([0]), 2
    )
    assert (accepted.tolist(), path.tolist()) == ([2], [[1, 3]])
    assert (bonus.tolist(), tokens.tolist()) == ([5], [[1, 4, 5]])


@pytest.mark.parametrize("name", TREE_OPS)
def test_more_than_a_mask_holds_is_an_error(name: str) -> None:
    trees = random_trees(1, 80, 1000, "flat", torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="at most 64 nodes"):
        load_tree_ops(CPU, name).choose([trees], [MAX_TREE], [9], 0.0)


def test_bad_arrays_are_errors(ops: TreeOps) -> None:
    """Kernels index by what they are given, so they check it."""
    trees = random_trees(2, 6, 10, "bushy", torch.Generator().manual_seed(0))
    forward = Trees(trees.tokens, torch.tensor([[NO_PARENT, 3, 0, 0, 0, 0]] * 2), trees.confidence, trees.source)
    with pytest.raises(ValueError, match="before its children"):
        ops.choose([forward], [5, 5], [5, 5], 0.0)
    with pytest.raises(ValueError, match="same rows"):
        ops.choose([trees, random_trees(1, 6, 10, "bushy", torch.Generator())], [5, 5], [5, 5], 0.0)
    chain = Trees(torch.tensor([[1, 2]]), torch.tensor([[NO_PARENT, 0]]), torch.ones(1, 2), torch.tensor([[0, 1]]))
    masks = torch.tensor([[1, 3]])
    with pytest.raises(IndexError, match="node 1 of 1"):
        ops.walk(chain, masks, torch.tensor([2]), torch.tensor([0]), 1)
    with pytest.raises(ValueError, match="deeper than 0"):
        ops.walk(chain, masks, torch.tensor([2, 2]), torch.tensor([0]), 0)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown tree operations 'gpu'; there are: torch, cpu, device, auto"):
        load_tree_ops(CPU, "gpu")
