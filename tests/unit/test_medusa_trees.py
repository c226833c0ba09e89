"""Trees of independent guesses, against brute force; fixed trees and how they are found."""

from __future__ import annotations

import itertools
import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoding.drafters.product_tree import Candidates, FixedTrees, ProbableTrees, RankPath, eligible_paths
from decoding.drafters.static_tree import calibrated_choices, expected_tokens, read_choices
from decoding.errors import ConfigError
from models.tree import CERTAIN, IMPOSSIBLE, NO_PARENT, Trees, is_node
from tests.medusa import all_paths

CPU = torch.device("cpu")


def candidates(confidence: Tensor) -> Candidates:
    """Tokens name row, depth and rank: 10000 * row + 100 * depth + rank."""
    rows, depths, ranks = (torch.arange(size) for size in confidence.shape)
    tokens = 10000 * rows[:, None, None] + 100 * (depths[:, None] + 1) + ranks
    return Candidates(10000 * rows, tokens, confidence)


def paths_of(trees: Trees, row: int) -> dict[RankPath, float]:
    """Rank path -> confidence of each node, by following parents."""
    found: dict[int, RankPath] = {0: ()}
    kept: dict[RankPath, float] = {}
    for column in range(1, trees.width):
        parent = int(trees.parents[row, column])
        if parent == NO_PARENT:
            assert int(trees.tokens[row, column]) == -1
            continue
        token = int(trees.tokens[row, column])
        path = (*found[parent], token % 100)
        assert token == 10000 * row + 100 * len(path) + path[-1], "of its row and depth"
        assert path not in kept
        found[column], kept[path] = path, float(trees.confidence[row, column])
    return kept


@st.composite
def confidences(draw: st.DrawFn) -> Tensor:
    """[S, D, K] float32, falling along K, with ties, zeros and ones."""
    rows, depth, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["random", "ties", "sharp", "flat"]))
    drawn = torch.rand(rows, depth, ranks, generator=generator)
    drawn = {
        "random": drawn,
        "ties": (4 * drawn).round() / 4,
        "sharp": drawn**20,
        "flat": torch.full_like(drawn, 0.2),
    }[kind]
    return drawn.sort(dim=2, descending=True).values


@given(confidences(), st.integers(1, 63))
@settings(max_examples=150, deadline=None)
def test_the_most_probable_nodes(confidence: Tensor, nodes: int) -> None:
    rows, depth, ranks = confidence.shape
    trees = ProbableTrees(depth, ranks, CPU).grow(candidates(confidence), nodes, source=4)
    trees.validate()
    assert trees.num_rows == rows
    assert trees.width <= 1 + nodes
    assert (trees.source == 4 * is_node(trees)).all()
    bounded = confidence.clamp(max=CERTAIN).double()
    for row in range(rows):
        chances = {p: prod(float(bounded[row, d, r]) for d, r in enumerate(p)) for p in all_paths(depth, ranks)}
        kept = paths_of(trees, row)
        for path, value in kept.items():
            assert value == float(confidence[row, len(path) - 1, path[-1]])
        possible = sorted((c for c in chances.values() if c >= IMPOSSIBLE), reverse=True)[:nodes]
        assert sorted((chances[path] for path in kept), reverse=True) == pytest.approx(possible, rel=1e-5)


def test_fewer_depths_than_heads() -> None:
    shape = ProbableTrees(4, 3, CPU)
    confidence = torch.tensor([[[0.5, 0.3, 0.1], [0.6, 0.2, 0.1], [0.9, 0.05, 0.01], [0.9, 0.05, 0.01]]])
    assert set(paths_of(shape.grow(candidates(confidence[:, :1]), 9, 1), 0)) == {(0,), (1,), (2,)}
    assert set(paths_of(shape.grow(candidates(confidence[:, :2]), 3, 1), 0)) == {(0,), (1,), (0, 0)}
    deep = set(paths_of(shape.grow(candidates(confidence), 5, 1), 0))
    assert deep == {(0,), (1,), (0, 0), (0, 0, 0), (0, 0, 0, 0)}


@pytest.mark.parametrize(("depth", "ranks", "nodes"), [(1, 10, 4), (3, 4, 1), (3, 4, 12), (4, 10, 63)])
def test_eligible_paths_are_closed_and_enough(depth: int, ranks: int, nodes: int) -> None:
    """Each is the least probable of the best ``nodes`` for some confidences: none could be left out."""
    eligible = eligible_paths(depth, ranks, nodes)
    assert len(set(eligible)) == len(eligible)
    assert all(len(path) == 1 or path[:-1] in set(eligible) for path in eligible)
    for path in eligible:
        above = set(itertools.product(*(range(rank + 1) for rank in path)))
        above |= {other[:length] for other in above for length in range(1, len(path))}
        assert len(above) <= nodes


def test_a_fixed_tree_is_kept_whole() -> None:
    choices = [(1,), (0, 2), (0,), (0, 2, 0), (3,)]
    shape = FixedTrees(choices, CPU)
    assert (shape.depth, shape.ranks) == (3, 4)
    confidence = torch.zeros(2, 3, 4)
    confidence[0] = torch.tensor([0.7, 0.2, 0.1, 0.0])
    trees = shape.grow(candidates(confidence), 2, source=2)
    trees.validate()
    for row in range(2):
        kept = paths_of(trees, row)
        assert set(kept) == set(choices)
        for path in choices:
            assert prod(kept[path[:d]] for d in range(1, len(path) + 1)) > IMPOSSIBLE
    assert paths_of(trees, 0)[(0,)] == pytest.approx(0.7)
    shallow = shape.grow(candidates(confidence[:, :2]), 63, source=2)
    assert set(paths_of(shallow, 1)) == {(0,), (1,), (3,), (0, 2)}


# calibration ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.55, 1.0]), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_calibrated_choices_are_the_best_tree(accuracy: list[list[float]], nodes: int) -> None:
    choices = calibrated_choices(accuracy, nodes)
    assert len(set(choices)) == len(choices) <= nodes
    assert all(len(path) == 1 or path[:-1] in choices for path in choices)
    every = [
        path
        for depth in range(1, len(accuracy) + 1)
        for path in itertools.product(*(range(len(accuracy[level])) for level in range(depth)))
    ]
    chances = sorted((prod(accuracy[level][rank] for level, rank in enumerate(p)) for p in every), reverse=True)
    best = [chance for chance in chances[:nodes] if chance > 0]
    assert expected_tokens(accuracy, choices) == pytest.approx(1 + sum(best))
    assert len(choices) == len(best)


def test_calibrated_choices_by_hand() -> None:
    accuracy = [[0.6, 0.2, 0.09], [0.5, 0.1, 0.05]]
    assert calibrated_choices(accuracy, 5) == [(0,), (0, 0), (1,), (1, 0), (2,)]
    assert expected_tokens(accuracy, [(0,), (0, 0), (1,)]) == pytest.approx(1 + 0.6 + 0.3 + 0.2)


# files ---------------------------------------------------------------------------------------------------------------


def written(path: Path, content: object) -> Path:
    file = path / "choices.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_both_layouts_are_read(tmp_path: Path) -> None:
    listed = [[0], [0, 0], [1], [0, 1], [0, 0, 4]]
    expected = [tuple(path) for path in listed]
    assert read_choices(written(tmp_path, listed), 3, 50) == expected
    assert read_choices(written(tmp_path, {"medusa_choices": listed, "accuracy": []}), 3, 50) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [1", "cannot be read"),
        ({"choices": [[0]]}, "holds no tree; write a JSON list of rank paths"),
        ([[0], 1], "holds no tree"),
        ([[0], []], "holds no tree"),
        ([[0], [-1]], "holds no tree"),
        ([[0], [True]], "holds no tree"),
        ([[0.5]], "holds no tree"),
        ([], "has 0 nodes"),
        ([[rank] for rank in range(40)] + [[0, rank] for rank in range(24)], "has 64 nodes; it may have 1 to 63"),
        ([[0], [0, 0], [0, 0, 0]], r"\[0, 0, 0\] in .* is 3 deep, and there are 2 heads"),
        ([[0], [1, 0]], r"\[1, 0\] in .* hangs on \[1\], which is not in the list"),
        ([[0], [50]], r"\[50\] in .* has a rank above 49"),
    ],
)
def test_trees_that_cannot_be_used(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_choices(written(tmp_path, content), heads=2, vocab_size=50)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tree file .*medusa_choices\.json; `saccade calibrate` makes it"):
        read_choices(tmp_path / "medusa_choices.json", 2, 50)
