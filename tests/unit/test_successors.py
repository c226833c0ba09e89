"""Token Recycling's matrix: the kernel against its definition, what is learned, and how much is kept."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from decoding.drafters.successors import (
    EDGES,
    MODES,
    Lesson,
    Matrices,
    Matrix,
    Wish,
    classes_of,
    first_counts,
    grow_anywhere,
    grow_fused,
    learn_anywhere,
    learn_fused,
)
from models import kernels
from models.tree import depths, is_node

VOCAB = 30


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """The kernels must work where tests run."""
    kernels.required()


def a_lesson(luck: np.random.Generator, matrices: int, top_k: int) -> Lesson:
    """Rows with trees of random tokens, of which a random path was accepted."""
    rows = int(luck.integers(1, 4))
    sizes = luck.integers(1, 7, rows)
    nodes = int(sizes.sum())
    deepest = int(luck.integers(0, 4))
    path = np.full((rows, deepest), -1)
    for row, size in enumerate(sizes):
        columns = np.sort(luck.permutation(np.arange(1, size))[: luck.integers(0, deepest + 1)])
        path[row, : len(columns)] = columns
    known = int(luck.integers(1, top_k + 1))
    logits = np.sort(luck.normal(0, 3, (nodes, known)).astype(np.float32))[:, ::-1].copy()
    return Lesson(
        owner=luck.integers(0, matrices, rows).tolist(),
        modes=luck.integers(0, MODES, rows).tolist(),
        texts=[luck.integers(0, VOCAB, luck.integers(1, 8)) for _ in range(rows)],
        tokens=luck.integers(0, VOCAB, nodes),
        first=np.concatenate([[0], sizes[:-1].cumsum()]),
        path=path,
        ids=np.stack([luck.permutation(VOCAB)[:known] for _ in range(nodes)]),
        logits=logits,
    )


def a_wish(luck: np.random.Generator, matrices: int) -> Wish:
    rows = int(luck.integers(1, 5))
    return Wish(
        owner=luck.integers(0, matrices, rows).tolist(),
        modes=luck.integers(0, MODES, rows).tolist(),
        roots=luck.integers(0, VOCAB, rows).tolist(),
        nodes=luck.choice([0, 1, 5, 24, 63], rows).tolist(),
        depth=luck.integers(1, 9, rows).tolist(),
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_kernel_learns_and_grows_what_the_definition_does(seed: int) -> None:
    luck = np.random.default_rng(seed)
    count, top_k = int(luck.integers(1, 4)), int(luck.choice([1, 3, 8, 20]))
    ours, theirs = ([Matrix(VOCAB, top_k) for _ in range(count)] for _ in range(2))
    our_counts, their_counts = first_counts(top_k), first_counts(top_k)
    grown = 0
    for _ in range(25):
        lesson, wish = a_lesson(luck, count, top_k), a_wish(luck, count)
        with_trees = None if luck.random() < 0.5 else lesson  # in one call, or in two
        if with_trees is None:
            learn_fused(ours, our_counts, lesson)
        trees = grow_fused(ours, our_counts, wish, 3, with_trees)
        learn_anywhere(theirs, their_counts, lesson)
        assert torch.equal(our_counts, their_counts)
        for mine, other in zip(ours, theirs, strict=True):
            known = mine.index > 0
            assert mine.used == other.used == int(known.sum())
            assert torch.equal(known, other.index > 0)
            rows = (m.rows[m.index[known].long() - 1] for m in (mine, other))
            assert torch.equal(*rows)
        expected = grow_anywhere(theirs, their_counts, wish, 3)
        assert (trees is None) == (expected is None)
        if trees is not None and expected is not None:
            trees.validate()
            grown += 1
            for name in ("tokens", "parents", "confidence", "source"):
                assert torch.equal(getattr(trees, name), getattr(expected, name)), name
            assert set(trees.source.unique().tolist()) <= {0, 8}
            assert (is_node(trees).sum(dim=1) <= torch.tensor(wish.nodes)).all()
            assert (depths(trees.parents).amax(dim=1) <= torch.tensor(wish.depth)).all()
    assert grown > 10


def test_a_kernel_refuses_what_does_not_fit() -> None:
    matrix, counts = Matrix(VOCAB, 8), first_counts(8)
    lesson = a_lesson(np.random.default_rng(0), 1, 8)
    lesson.tokens[0] = VOCAB
    with pytest.raises(IndexError, match=f"token {VOCAB} of {VOCAB}"):
        learn_fused([matrix], counts, lesson)
    with pytest.raises(IndexError, match="token -1"):
        grow_fused([matrix], counts, Wish([0], [0], [-1], [4], [4]), 0)
    with pytest.raises(IndexError, match="matrix 1 of 1"):
        grow_fused([matrix], counts, Wish([1], [0], [1], [4], [4]), 0)


# what is learned -----------------------------------------------------------------------------------------------------


def shown(
    tokens: list[int], path: list[int], text: list[int], successors: list[list[int]], logits: list[float] | None = None
) -> Lesson:
    """One greedy row: its nodes' tokens, the columns that were accepted, and each node's successors."""
    width = len(successors[0])
    row = np.arange(width, 0, -1) if logits is None else np.array(logits)
    return Lesson(
        owner=[0],
        modes=[0],
        texts=[np.array(text)],
        tokens=np.array(tokens),
        first=np.array([0]),
        path=np.array([path], dtype=np.int64),
        ids=np.array(successors),
        logits=np.tile(row.astype(np.float32), (len(tokens), 1)),
    )


def children(matrix: Matrix, counts: torch.Tensor, token: int) -> list[int]:
    """Tokens of a tree's first level."""
    trees = grow_fused([matrix], counts, Wish([0], [0], [token], [63], [1]), 0)
    return [] if trees is None else trees.tokens[0, 1:].tolist()


def test_nodes_that_were_not_accepted_teach() -> None:
    matrix, counts = Matrix(VOCAB, 3), first_counts(3)
    learn_fused([matrix], counts, shown([1, 2, 3], [], [1, 9], [[9, 2, 3], [4, 5, 6], [7, 8, 9]]))
    assert children(matrix, counts, 1) == [9, 2, 3]
    assert children(matrix, counts, 2) == [4, 5, 6]
    assert children(matrix, counts, 3) == [7, 8, 9]
    assert children(matrix, counts, 4) == [], "nobody has seen it"
    trees = grow_fused([matrix], counts, Wish([0], [0], [1], [63], [2]), 0)
    assert trees is not None
    assert Counter(depths(trees.parents)[0].tolist()) == {0: 1, 1: 3, 2: 6}


def test_of_equal_tokens_the_node_on_the_text_counts_and_else_the_last() -> None:
    matrix, counts = Matrix(VOCAB, 1), first_counts(1)
    learn_fused([matrix], counts, shown([1, 5, 5, 6, 6], [1], [1, 5, 7], [[5], [7], [8], [9], [10]]))
    assert children(matrix, counts, 5) == [7]
    assert children(matrix, counts, 6) == [10]
    learn_fused([matrix], counts, shown([5], [], [5, 11], [[11]]))
    assert children(matrix, counts, 5) == [11], "what was seen last is kept"


def test_before_anything_is_counted_trees_are_about_the_papers() -> None:
    """Its template has 80 nodes, of which 8, 21, 25, 15, 8 and 3 at depths 1 to 6."""
    matrix, counts = Matrix(VOCAB, 8), first_counts(8)
    everyone = list(range(VOCAB))
    successors = [[(token + 1 + rank) % VOCAB for rank in range(8)] for token in everyone]
    learn_fused([matrix], counts, shown(everyone, [], [0], successors))
    trees = grow_fused([matrix], counts, Wish([0], [0], [0], [80], [20]), 0)
    assert trees is not None
    levels = Counter(depths(trees.parents)[0].tolist())
    template = {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert sum(abs(levels[depth] - wide) for depth, wide in template.items()) <= 10
    assert max(levels) == 6


@pytest.mark.parametrize("right", [0.15, 0.5, 0.9])
def test_confidence_becomes_the_share_of_the_text(right: float) -> None:
    """The successor of rank 1 comes in that share of places; rank 0 never does."""
    luck = np.random.default_rng(1)
    matrix, counts = Matrix(VOCAB, 2), first_counts(2)
    guesses: list[float] = []
    for turn in range(3000):
        came = 8 if luck.random() < right else 9
        learn_fused([matrix], counts, shown([1], [], [1, came], [[7, 8]]))
        trees = grow_fused([matrix], counts, Wish([0], [0], [1], [2], [1]), 0)
        assert trees is not None
        if turn > 1000:
            of = dict(zip(trees.tokens[0].tolist(), trees.confidence[0].tolist(), strict=True))
            guesses.append(of[8])
            assert of[7] < 0.02
            assert trees.tokens[0, 1] == 8, "what comes is offered first, whatever the model found likelier"
    assert np.mean(guesses) == pytest.approx(right, abs=0.03)


def test_sure_successors_are_told_from_doubtful_ones() -> None:
    """Both are of rank 0; where the model was sure it was right, where it was not it was wrong."""
    matrix, counts = Matrix(VOCAB, 2), first_counts(2)
    for _ in range(100):
        learn_fused([matrix], counts, shown([1], [], [1, 2], [[2, 3]], [9.0, 0.0]))
        learn_fused([matrix], counts, shown([4], [], [4, 9], [[5, 6]], [1.0, 0.9]))
    trees = grow_fused([matrix, matrix], counts, Wish([0, 1], [0, 0], [1, 4], [1, 1], [1, 1]), 0)
    assert trees is not None
    assert trees.confidence[0, 1] > 0.9
    assert trees.confidence[1, 1] < 0.1


def test_classes_are_of_shares() -> None:
    shares = np.array([[0.96, 0.03, 0.01], [0.6, 0.3, 0.1]])
    assert classes_of(np.log(shares + 1e-6).astype(np.float32)).tolist() == [[7, 2, 1], [5, 4, 3]]
    assert len(EDGES) == 7
    assert classes_of(np.array([[0.0, -np.inf]], dtype=np.float32)).tolist() == [[7, 0]]


# memory --------------------------------------------------------------------------------------------------------------


def test_memory_stays_within_its_bound_and_the_salt_used_longest_ago_goes() -> None:
    luck = np.random.default_rng(3)
    vocab, top_k, salts = 5000, 8, 4
    matrices, counts = Matrices(vocab, top_k, salts), first_counts(top_k)
    recent: list[str] = []
    for _ in range(10_000):
        salt = f"tenant {luck.integers(12)}"
        kept, owner = matrices.of([salt])
        assert (len(kept), owner) == (1, [0])
        fresh = salt not in recent
        assert (kept[0].used == 0) == fresh
        recent = [*(each for each in recent if each != salt), salt][-salts:]
        token = int(luck.integers(vocab))
        successors = [(token + rank) % vocab for rank in range(top_k)]
        learn_fused(kept, counts, shown([token], [], [token], [successors]))
        assert len(matrices) <= salts
        assert matrices.nbytes <= salts * vocab * 4 * (1 + top_k)


def test_rows_are_kept_of_tokens_that_were_seen() -> None:
    matrix, counts = Matrix(150_000, 8), first_counts(8)
    for token in range(0, 150_000, 300):
        learn_fused([matrix], counts, shown([token], [], [token], [list(range(8))]))
    assert matrix.used == 500
    assert matrix.rows.nbytes <= 2 * 500 * 4 * 8
    assert children(matrix, counts, 149_700) == list(range(8))


def test_rows_of_one_step_may_have_the_same_salt_or_others() -> None:
    matrices = Matrices(VOCAB, 8, 2)
    kept, owner = matrices.of(["a", "b", "a", "c"])
    assert owner == [0, 1, 0, 2]
    assert len({id(matrix) for matrix in kept}) == 3, "more than are kept, for as long as the step lasts"
    assert len(matrices) == 2
