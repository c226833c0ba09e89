"""Acceptance rules over the table: what every verdict must be, and the exact rule against a walk in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.batcher import Nodes
from decoding.request import GenerateRequest, SamplingParams
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from decoding.verify import RULES, Verdict
from models.batch import MAX_TREE
from models.tree import Trees, roots_only
from models.tree_ops import TREE_OPS, load_tree_ops
from tests.steps import CPU, Tree, pack, sampling_of

WORDS = 3  # few, so that drawn tokens are often there
VOCAB = 5
everywhere = pytest.mark.parametrize(("name", "ops"), [(name, ops) for name in RULES for ops in TREE_OPS])


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tree, list[int]]:
    """A tree whose siblings differ, and the token drawn at each of its nodes."""
    tree: Tree = []
    deep = draw(st.booleans())
    cells = st.tuples(st.integers(0, 62), st.integers(0, WORDS - 1))
    least = draw(st.sampled_from([0, 0, 12, 40]))
    for place, token in draw(st.lists(cells, min_size=least, max_size=MAX_TREE - 1)):
        size = 1 + len(tree)
        parent = size - 1 - place % min(2, size) if deep else place % size
        if (parent, token) not in tree:
            tree.append((parent, token))
    drawn = draw(st.lists(st.integers(0, WORDS - 1), min_size=1 + len(tree), max_size=1 + len(tree)))
    for parent, token in reversed(tree):  # draws that follow a child are what makes long paths
        if draw(st.booleans()):
            drawn[parent] = token
    return tree, drawn


def judge(name: str, ops: str, batch: list[tuple[Tree, list[int]]], spare: int = 0) -> tuple[Trees, Nodes, Verdict]:
    """The verdict over trees with padding on the right, and room for ``spare`` more depths than there are."""
    trees, nodes = pack([tree for tree, _ in batch])
    drawn = torch.tensor([token for _, drawn in batch for token in drawn])
    logits = torch.nn.functional.one_hot(drawn, VOCAB).float()
    rule = RULES[name](load_tree_ops(CPU, ops))
    return trees, nodes, rule(trees, nodes, logits, greedy(len(batch)), int(nodes.depth.max()) + spare)


def greedy(rows: int) -> Sampling:
    """Of rows that draw the likeliest token."""
    request = GenerateRequest("r", (0,), SamplingParams(temperature=0.0))
    return sampling_of([Sequence(request, 0, 0) for _ in range(rows)], vocab=VOCAB)


def walk(tree: Tree, drawn: list[int]) -> tuple[list[int], list[int]]:
    """(columns of the accepted path, tokens with the bonus) by following the draws one by one."""
    column = 0
    path, tokens = [], []
    while True:
        tokens.append(drawn[column])
        if (column, drawn[column]) not in tree:
            return path, tokens
        column = 1 + tree.index((column, drawn[column]))
        path.append(column)


@everywhere
@given(batch=st.lists(rows(), min_size=1, max_size=4), spare=st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_every_verdict_is_a_path_and_a_bonus(
    name: str, ops: str, batch: list[tuple[Tree, list[int]]], spare: int
) -> None:
    trees, nodes, verdict = judge(name, ops, batch, spare)
    deepest = int(nodes.depth.max()) + spare
    # (a batch of bare roots needs no room)
    deepest = verdict.path.shape[1] if trees.width == 1 else deepest
    assert verdict.path.shape == (len(batch), deepest)
    assert verdict.tokens.shape == (len(batch), deepest + 1)
    for r, (_, drawn) in enumerate(batch):
        accepted = int(verdict.accepted[r])
        path, column = verdict.path[r].tolist(), 0
        assert path[accepted:] == [-1] * (deepest - accepted)
        for step in path[:accepted]:
            assert int(trees.parents[r, step]) == column
            column = step
        assert int(verdict.bonus[r]) == drawn[column]
        tokens = [int(trees.tokens[r, step]) for step in path[:accepted]] + [int(verdict.bonus[r])]
        assert verdict.tokens[r].tolist() == tokens + [-1] * (deepest - accepted)


@pytest.mark.parametrize("ops", TREE_OPS)
@given(batch=st.lists(rows(), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_exact_follows_the_draws(ops: str, batch: list[tuple[Tree, list[int]]]) -> None:
    _, _, verdict = judge("exact", ops, batch)
    for r, (tree, drawn) in enumerate(batch):
        path, tokens = walk(tree, drawn)
        assert int(verdict.accepted[r]) == len(path)
        assert verdict.path[r, : len(path)].tolist() == path
        assert verdict.tokens[r, : len(tokens)].tolist() == tokens
        assert int(verdict.bonus[r]) == tokens[-1]


@everywhere
def test_a_bare_root_is_plain_decoding(name: str, ops: str) -> None:
    trees, _, verdict = judge(name, ops, [([], [3]), ([], [4])])
    assert torch.equal(trees.tokens, roots_only(torch.tensor([0, 0])).tokens)
    assert verdict.accepted.tolist() == [0, 0]
    assert verdict.path.shape == (2, 0)
    assert verdict.tokens.tolist() == [[3], [4]]
    assert verdict.bonus.tolist() == [3, 4]


@pytest.mark.parametrize("ops", TREE_OPS)
def test_exact_accepts_a_chain_of_63(ops: str) -> None:
    tree = [(column, column % WORDS) for column in range(MAX_TREE - 1)]
    drawn = [column % WORDS for column in range(MAX_TREE)]
    _, _, verdict = judge("exact", ops, [(tree, drawn)])
    assert verdict.accepted.tolist() == [63]
    assert verdict.tokens.tolist() == [drawn]
