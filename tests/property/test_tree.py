"""Token trees against plain Python on random trees."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.batch import MAX_TREE
from models.tree import (
    CERTAIN,
    IMPOSSIBLE,
    NO_PARENT,
    Trees,
    ancestor_masks,
    best_nodes,
    depths,
    is_node,
    mask_depths,
    merge,
    path_columns,
    path_confidence,
)

ROOT_TOKEN = 7
quick = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Node:
    parent: int
    token: int
    confidence: float
    source: int


Row = list[Node | None]  # None is the root at place 0, padding elsewhere

confidences = st.one_of(st.sampled_from([0.0, 0.5, float(np.float32(0.9)), 1.0]), st.floats(0, 1, width=32))
columns = st.tuples(st.integers(0, 62), st.integers(0, 3), confidences, st.integers(1, 7), st.integers(0, 9))


@st.composite
def rows(draw: st.DrawFn, longest: int = MAX_TREE) -> Row:
    """A random tree; siblings differ in their tokens, as the trees of drafters do."""
    row: Row = [None]
    taken: set[tuple[int, int]] = set()
    least = draw(st.sampled_from([0, 0, 10, longest // 2]))
    for place, token, confidence, source, luck in draw(st.lists(columns, min_size=least, max_size=longest - 1)):
        there = [0, *(i for i, node in enumerate(row) if node is not None)]
        # near the end as often as anywhere: deep trees are rare among uniformly random ones
        parent = there[-1 - place % 2] if luck > 5 and len(there) > 1 else there[place % len(there)]
        padding = luck == 0 or (parent, token) in taken
        taken.add((parent, token))
        row.append(None if padding else Node(parent, token, confidence, source))
    return row


def as_trees(batch: list[Row], width: int | None = None) -> Trees:
    width = width or max(map(len, batch))
    tokens, parents = torch.full((len(batch), width), -1), torch.full((len(batch), width), NO_PARENT)
    confidence, source = torch.zeros(len(batch), width), torch.zeros(len(batch), width, dtype=torch.int64)
    tokens[:, 0], confidence[:, 0] = ROOT_TOKEN, 1.0
    for r, row in enumerate(batch):
        for c, node in enumerate(row):
            if node is not None:
                tokens[r, c], parents[r, c], source[r, c] = node.token, node.parent, node.source
                confidence[r, c] = node.confidence
    return Trees(tokens, parents, confidence, source)


def inherited(row: Row, spared: int) -> Row:
    """The row with the ancestors of each node having its sources in ``spared``, as in a drafter's own tree."""
    row = list(row)
    for column in reversed(range(len(row))):
        node = row[column]
        above = row[node.parent] if node is not None else None
        if node is not None and above is not None:
            row[node.parent] = replace(above, source=above.source | node.source & spared)
    return row


def path(row: Row, column: int) -> list[int]:
    """Columns from the root to ``column``."""
    node = row[column]
    return [0] if column == 0 or node is None else [*path(row, node.parent), column]


def words(row: Row, column: int) -> tuple[int, ...]:
    return tuple(node.token for node in map(row.__getitem__, path(row, column)[1:]) if node is not None)


def nodes_of(row: Row) -> list[int]:
    return [column for column, node in enumerate(row) if node is not None]


def by_words(trees: Trees, row: int) -> dict[tuple[int, ...], tuple[float, int]]:
    """path of tokens -> (confidence, source) of each node of a row, read from the arrays."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    result = {}
    for column in range(1, trees.width):
        parent = int(trees.parents[row, column])
        if parent != NO_PARENT:
            found[column] = (*found[parent], int(trees.tokens[row, column]))
            assert found[column] not in result, "a node twice"
            result[found[column]] = (float(trees.confidence[row, column]), int(trees.source[row, column]))
    return result


@given(st.lists(rows(), min_size=1, max_size=3))
@quick
def test_depths_masks_and_paths(batch: list[Row]) -> None:
    trees = as_trees(batch)
    trees.validate()
    depth, masks = depths(trees.parents), ancestor_masks(trees.parents)
    longest = 1 + int(depth.max())
    along, cut = path_columns(masks, longest), path_columns(masks, 2)
    by_mask = mask_depths(masks)
    for r, row in enumerate(batch):
        for column in [0, *nodes_of(row)]:
            expected = path(row, column)
            assert int(depth[r, column]) == int(by_mask[r, column]) == len(expected) - 1
            assert int(masks[r, column]) % 2**64 == sum(1 << c for c in expected)
            assert along[r, column].tolist() == expected + [-1] * (longest - len(expected))
            assert cut[r, column].tolist() == (expected + [-1])[:2]
        assert not depth[r, [c for c in range(trees.width) if c >= len(row) or row[c] is None]].any()


@given(st.lists(rows(), min_size=1, max_size=3))
@quick
def test_path_confidence(batch: list[Row]) -> None:
    trees = as_trees(batch)
    actual = path_confidence(trees)
    for r, row in enumerate(batch):
        sums: defaultdict[int, float] = defaultdict(float)
        for node in filter(None, row):
            sums[node.parent] += node.confidence
        for column in nodes_of(row):
            shares = [
                min(node.confidence / max(1.0, sums[node.parent]), CERTAIN)
                for node in map(row.__getitem__, path(row, column))
                if node is not None
            ]
            assert float(actual[r, column]) == pytest.approx(prod(shares), rel=2e-5, abs=1e-30)
            node = row[column]
            assert node is not None
            if float(actual[r, column]) >= IMPOSSIBLE:
                assert actual[r, column] < actual[r, node.parent]
        assert float(actual[r, 0]) == 1.0
    assert not actual[:, 1:][~is_node(trees)[:, 1:]].any()


@given(st.lists(st.tuples(rows(24), rows(24), rows(24)), min_size=1, max_size=3), st.integers(1, 3))
@quick
def test_merge(batch: list[tuple[Row, Row, Row]], count: int) -> None:
    parts = [as_trees([group[i] for group in batch]) for i in range(count)]
    merged = merge(parts)
    merged.validate()
    assert merged.width == 1 + sum(part.width - 1 for part in parts)
    for r, group in enumerate(batch):
        expected: dict[tuple[int, ...], tuple[float, int]] = {}
        for row in group[:count]:
            for column in nodes_of(row):
                node, key = row[column], words(row, column)
                assert node is not None
                confidence, source = expected.get(key, (0.0, 0))
                expected[key] = (max(confidence, node.confidence), source | node.source)
        assert by_words(merged, r) == expected
    assert (merged.tokens[:, 0] == ROOT_TOKEN).all()
    assert (merged.tokens == -1).equal(~is_node(merged) & (torch.arange(merged.width) > 0))


@given(
    st.lists(st.tuples(rows(), st.integers(0, 63), st.integers(0, 12)), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([0, 1, 2]),
)
@quick
def test_best_nodes(batch: list[tuple[Row, int, int]], min_probability: float, spared: int) -> None:
    trees = as_trees([inherited(row, spared) for row, _, _ in batch])
    max_nodes, max_depth = (torch.tensor([case[i] for case in batch]) for i in (1, 2))
    best = best_nodes(trees, max_nodes, max_depth, 64, min_probability, spared)
    best.validate()
    probability = path_confidence(trees)
    for r, (row, nodes, depth) in enumerate(batch):
        source = trees.source[r].tolist()
        allowed = [
            column
            for column in nodes_of(row)
            if len(path(row, column)) - 1 <= depth
            and probability[r, column] >= max(0.0 if source[column] & spared else min_probability, IMPOSSIBLE)
        ]
        chosen = sorted(sorted(allowed, key=lambda column: -float(probability[r, column]))[:nodes])
        used = is_node(best)[r]
        assert used.tolist() == [False] + [True] * len(chosen) + [False] * (63 - len(chosen)), "padding on the right"
        assert best.tokens[r, 1 : 1 + len(chosen)].tolist() == trees.tokens[r, chosen].tolist(), "in tree order"
        kept = [words(row, column) for column in chosen]
        assert list(by_words(best, r)) == kept, "each under its own parent"
        originals = by_words(trees, r)
        assert by_words(best, r) == {key: originals[key] for key in kept}


@given(rows())
@quick
def test_merging_a_tree_with_itself_changes_nothing(row: Row) -> None:
    trees = as_trees([row])
    assert by_words(merge([trees, trees]), 0) == by_words(trees, 0)
    assert merge([trees]) is trees
