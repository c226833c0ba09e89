"""Token trees on examples small enough to draw."""

from __future__ import annotations

import pytest
import torch

from models.batch import MAX_TREE
from models.tree import (
    CERTAIN,
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
    roots_only,
)

#        0
#      /   \
#     1     2
#     |    / \
#     3   4   5        column 6 is padding
PARENTS = [NO_PARENT, 0, 0, 1, 2, 2, NO_PARENT]
TOKENS = [9, 1, 2, 3, 4, 5, -1]


def tree(
    tokens: list[int], parents: list[int], confidence: list[float] | None = None, source: list[int] | None = None
) -> Trees:
    """One row."""
    nodes = [1 if parent != NO_PARENT else 0 for parent in parents]
    confidence = confidence or [1.0, *(0.5 * node for node in nodes[1:])]
    return Trees(
        torch.tensor([tokens]),
        torch.tensor([parents]),
        torch.tensor([confidence]),
        torch.tensor([source or nodes]),
    )


def test_depths_and_masks() -> None:
    parents = torch.tensor([PARENTS])
    assert depths(parents).tolist() == [[0, 1, 1, 2, 2, 2, 0]]
    masks = ancestor_masks(parents)
    assert masks.tolist()[0][:6] == [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b100101]
    assert mask_depths(masks).tolist()[0][:6] == [0, 1, 1, 2, 2, 2]
    assert path_columns(masks, 3).tolist()[0][3:5] == [[0, 1, 3], [0, 2, 4]]
    assert path_columns(masks, 2).tolist()[0][:2] == [[0, -1], [0, 1]]


def test_a_chain_of_64_uses_every_bit_of_the_mask() -> None:
    parents = torch.arange(-1, MAX_TREE - 1)[None]
    masks = ancestor_masks(parents)
    assert int(masks[0, -1]) == -1  # all 64 bits
    assert depths(parents)[0].tolist() == list(range(MAX_TREE))
    assert path_columns(masks, MAX_TREE)[0, -1].tolist() == list(range(MAX_TREE))


def test_a_tree_of_65_has_no_mask() -> None:
    with pytest.raises(ValueError, match="at most 64 nodes"):
        ancestor_masks(torch.arange(-1, MAX_TREE)[None])


def test_siblings_share_at_most_certainty() -> None:
    probability = path_confidence(tree([9, 1, 2, 3], [NO_PARENT, 0, 0, 1], [1.0, 0.9, 0.6, 0.5]))[0].tolist()
    assert probability == pytest.approx([1.0, 0.6, 0.4, 0.3], rel=1e-6)


def test_merge_unites_paths() -> None:
    #  9 - 1 - 3          9 - 2
    #    - 2                - 1 - 3 - 7
    #                           - 4
    left = tree([9, 1, 2, 3], [NO_PARENT, 0, 0, 1], [1.0, 0.5, 0.25, 0.125], [0, 1, 1, 1])
    right = tree([9, 2, 1, 3, 4, 7], [NO_PARENT, 0, 0, 2, 2, 3], [1.0, 0.75, 0.125, 0.5, 0.25, 0.5], [0, 2, 2, 2, 2, 2])
    merged = merge([left, right])
    merged.validate()
    assert merged.tokens.tolist() == [[9, 1, 2, 3, -1, -1, -1, 4, 7]]
    assert merged.parents.tolist() == [[-1, 0, 0, 1, -1, -1, -1, 1, 3]]
    assert merged.confidence.tolist() == [[1.0, 0.5, 0.75, 0.5, 0.0, 0.0, 0.0, 0.25, 0.5]]
    assert merged.source.tolist() == [[0, 3, 3, 3, 0, 0, 0, 2, 2]]


def test_the_same_token_at_other_places_stays_apart() -> None:
    chain = tree([9, 1, 2], [NO_PARENT, 0, 1])
    turned = tree([9, 2, 1], [NO_PARENT, 0, 1])
    assert is_node(merge([chain, turned])).sum() == 4


def test_best_nodes_keeps_the_best_in_tree_order() -> None:
    trees = tree(TOKENS, PARENTS, [1.0, 0.3, 0.6, 0.9, 0.2, 0.8, 0.0])
    best = best_nodes(trees, torch.tensor([3]), torch.tensor([9]), 5)
    assert best.tokens.tolist() == [[9, 1, 2, 5, -1]]  # 0.6, 0.48 and 0.3; 3 has 0.27
    assert best.parents.tolist() == [[-1, 0, 0, 2, -1]]
    assert best.source.tolist() == [[0, 1, 1, 1, 0]]
    shallow = best_nodes(trees, torch.tensor([5]), torch.tensor([1]), 6)
    assert shallow.tokens.tolist() == [[9, 1, 2, -1, -1, -1]]
    likely = best_nodes(trees, torch.tensor([5]), torch.tensor([9]), 6, min_probability=0.29)
    assert likely.tokens.tolist() == [[9, 1, 2, 5, -1, -1]]
    none = best_nodes(trees, torch.tensor([0]), torch.tensor([9]), 1)
    assert none.tokens.tolist() == [[9]]


def test_impossible_nodes_are_never_bought() -> None:
    trees = tree([9, 1, 2], [NO_PARENT, 0, 1], [1.0, 0.0, 1.0])
    assert best_nodes(trees, torch.tensor([2]), torch.tensor([9]), 3).tokens.tolist() == [[9, -1, -1]]


def test_a_certain_child_never_outranks_its_parent() -> None:
    # 0.7 * 0.9 * 0.9 in another order of multiplication is larger by an ulp: rounding must not cut a parent off
    confidence = [1.0, 0.7, 0.9, 0.9, 1.0, 1.0, 1.0]
    trees = tree([9, 1, 2, 3, 4, 5, 6], list(range(-1, 6)), confidence)
    probability = path_confidence(trees)[0]
    assert (probability.diff() < 0).all()
    assert probability[6] == pytest.approx(0.567 * CERTAIN**3, rel=1e-6)
    for nodes in range(7):
        best = best_nodes(trees, torch.tensor([nodes]), torch.tensor([9]), 7)
        assert best.parents.tolist() == [[*range(-1, nodes), *[NO_PARENT] * (6 - nodes)]]


def test_roots_only() -> None:
    trees = roots_only(torch.tensor([4, 5]))
    trees.validate()
    assert (trees.num_rows, trees.width) == (2, 1)
    assert not is_node(trees).any()


@pytest.mark.parametrize(
    ("tokens", "parents", "confidence", "message"),
    [
        ([-1, 1], [-1, 0], [1.0, 0.5], "column 0"),
        ([3, 1], [0, 0], [1.0, 0.5], "column 0"),
        ([3, 1], [-1, 1], [1.0, 0.5], "before its children"),
        ([3, -1], [-1, 0], [1.0, 0.5], "has no token"),
        ([3, -1, 2], [-1, -1, 1], [1.0, 0.0, 0.5], "hangs on padding"),
        ([3, 1], [-1, 0], [1.0, 1.5], r"confidence must be in \[0, 1\]"),
    ],
)
def test_validate_names_what_is_wrong(
    tokens: list[int], parents: list[int], confidence: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tree(tokens, parents, confidence).validate()
