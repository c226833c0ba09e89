"""The matrix of Token Recycling: the successors of each token that the target last found likeliest (2408.08696, 3.2).

``learn`` writes what the nodes of a step showed, ``grow`` makes trees of what is written. Beside each successor stands
the *class* of its share of the probability when it was written, since what is sure once is mostly sure again: the
chance that rank r of class c is the token that comes, at a depth, is counted from the text.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.drafters.tries import Node, as_trees
from models import kernels
from models.tree import Trees

CLASS_BITS = 3  # an entry is id << CLASS_BITS | class; as in models/kernels/recycling.cpp
MAX_VOCAB = 1 << (31 - CLASS_BITS)
EDGES = (0.01, 0.03, 0.1, 0.25, 0.5, 0.8, 0.95)  # shares of the probability at which the next class begins
NOTHING = -1  # an entry that is not there
GREEDY, SAMPLED, MADE_UP = range(3)  # modes: what counts for one kind of text says nothing of the others
MODES = 3
LEVELS = 4  # depths that are told apart; the last one goes on
FIRST_ROWS = 256

# Chance of each rank before anything is counted: best-first trees of 80 nodes then have 8, 25, 25, 15, 6 and 1 nodes by
# depth, about the paper's template of 8, 21, 25, 15, 8 and 3. Later ranks fall on by the last one's ratio.
PRIOR = (0.40, 0.155, 0.094, 0.049, 0.030, 0.020, 0.0134, 0.009)
PRIOR_TRIALS = 12.0  # what it counts for
FADING = 1 - 1 / 512  # of what was counted, a trial


class Matrix:
    """Rows of the tokens that were seen: 4 bytes for each id of the vocabulary, 4 * top_k for each token seen."""

    def __init__(self, vocab_size: int, top_k: int) -> None:
        self.index = torch.from_numpy(np.zeros(vocab_size, dtype=np.int32))  # row + 1 of each token; 0: never seen
        self.rows = torch.empty(0, top_k, dtype=torch.int32)  # entries, likeliest first, NOTHING behind the last
        self.used = 0  # rows

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.rows.nbytes

    def reserve(self, more: int) -> None:
        """Make room for so many tokens that were not seen before."""
        vocab_size, (room, top_k) = len(self.index), self.rows.shape
        wanted = min(self.used + more, vocab_size)
        if wanted > room:
            grown = torch.empty(min(max(wanted, 2 * room, FIRST_ROWS), vocab_size), top_k, dtype=torch.int32)
            grown[: self.used] = self.rows[: self.used]
            self.rows = grown


class Matrices:
    """One matrix for each cache salt, as it holds traces of texts; the one used longest ago makes room.

    Texts that are made up have the salt None, and nobody else has.
    """

    def __init__(self, vocab_size: int, top_k: int, salts: int) -> None:
        self._size = vocab_size, top_k
        self._salts = salts
        self._by_salt: OrderedDict[str | None, Matrix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_salt)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(matrix.nbytes for matrix in self._by_salt.values())

    def of(self, salts: Many[str | None]) -> tuple[list[Matrix], list[int]]:
        """The matrices of some rows' salts, each once; and which of them is each row's."""
        places = {salt: place for place, salt in enumerate(dict.fromkeys(salts))}
        return [self._take(salt) for salt in places], [places[salt] for salt in salts]

    def drop(self, salt: str | None) -> None:
        """Forget what was learned under a salt."""
        self._by_salt.pop(salt, None)

    def _take(self, salt: str | None) -> Matrix:
        matrix = self._by_salt.get(salt)
        if matrix is not None:
            self._by_salt.move_to_end(salt)
            return matrix
        if len(self._by_salt) >= self._salts:
            self._by_salt.popitem(last=False)
        matrix = self._by_salt[salt] = Matrix(*self._size)
        return matrix


def first_counts(top_k: int) -> Tensor:
    """[MODES, LEVELS, top_k, classes, 2] float64: how often an entry was right, and how often there was one; fading."""
    last = PRIOR[-1] / PRIOR[-2]
    chances = [PRIOR[rank] if rank < len(PRIOR) else PRIOR[-1] * last ** (rank - 7) for rank in range(top_k)]
    counts = torch.empty(MODES, LEVELS, top_k, 1 << CLASS_BITS, 2, dtype=torch.float64)
    counts[..., 0] = PRIOR_TRIALS * torch.tensor(chances, dtype=torch.float64)[:, None]
    counts[..., 1] = PRIOR_TRIALS
    return counts


@dataclass(frozen=True)
class Lesson:
    """What the W nodes of a step showed, on the host. R rows; the nodes of a row follow each other, its root first."""

    owner: list[int]  # [R] which of the matrices is the row's
    modes: list[int]  # [R] GREEDY, SAMPLED, MADE_UP
    texts: list[np.ndarray]  # [R] int64 tokens from the root on
    tokens: np.ndarray  # [W] int64
    first: np.ndarray  # [R] int64, node of each root
    path: np.ndarray  # [R, D] int64 columns of the accepted nodes, padded with -1
    ids: np.ndarray  # [W, k] int64 likeliest successors, best first
    logits: np.ndarray  # [W, k] float32


@dataclass(frozen=True)
class Wish:
    """The trees that R rows would have."""

    owner: list[int]  # [R] which of the matrices is the row's
    modes: list[int]  # [R]
    roots: list[int]  # [R] tokens
    nodes: list[int]  # [R] at most, the root not counted
    depth: list[int]  # [R] at most


Learn = Callable[[list[Matrix], Tensor, Lesson], None]
"""Count how the entries fared that the trees were made of, then write the nodes' successors in their place.

Every verified node teaches, accepted or not; of nodes with one token the last counts, and those on the text come last.
"""


class Grow(Protocol):
    """Trees of the nodes with the highest path probabilities, parents first, from the drafter of that bit."""

    def __call__(
        self, matrices: list[Matrix], counts: Tensor, wish: Wish, bit: int, lesson: Lesson | None = None
    ) -> Trees | None:
        """A node is an entry of its parent's token's row, and its confidence the entry's chance. None: no nodes.

        Args:
            lesson: to be learned before, as ``Learn`` does; of the same matrices.
        """
        ...


def learn_anywhere(matrices: list[Matrix], counts: Tensor, lesson: Lesson) -> None:
    """``Learn`` in Python: what it means."""
    cells, path = counts.numpy(), lesson.path.tolist()
    ends = [*lesson.first.tolist()[1:], len(lesson.tokens)]
    entries = (lesson.ids << CLASS_BITS | classes_of(lesson.logits)).astype(np.int32)
    aside: list[tuple[Matrix, int]] = []
    accepted: list[tuple[Matrix, int]] = []
    for row, (first, end) in enumerate(zip(lesson.first.tolist(), ends, strict=True)):
        matrix = matrices[lesson.owner[row]]
        columns = {0, *(column for column in path[row] if column >= 0)}
        _judge(matrix, cells[lesson.modes[row]], lesson.texts[row][: len(columns) + 1].tolist())
        for column in range(end - first):
            (accepted if column in columns else aside).append((matrix, first + column))
    for matrix, node in aside + accepted:
        _write(matrix, int(lesson.tokens[node]), entries[node])


def classes_of(logits: np.ndarray) -> np.ndarray:
    """[W, k] int64 class of each successor's share of the probability of all k."""
    weights = np.exp(logits.astype(np.float64) - logits[:, :1].astype(np.float64))
    shares = weights / weights.sum(axis=1, keepdims=True)
    classes: np.ndarray = (shares[..., None] >= np.array(EDGES)).sum(axis=2)
    return classes


def _judge(matrix: Matrix, cells: np.ndarray, text: list[int]) -> None:
    """``cells`` [LEVELS, top_k, classes, 2] are of the row's mode."""
    for level, (before, after) in enumerate(itertools.pairwise(text)):
        for rank, entry in enumerate(_entries(matrix, before)):
            cell = cells[min(level, LEVELS - 1), rank, entry & (1 << CLASS_BITS) - 1]
            cell *= FADING
            cell += (entry >> CLASS_BITS == after, 1)


def _entries(matrix: Matrix, token: int) -> list[int]:
    """The row of a token; empty where it was never seen."""
    row = int(matrix.index[token])
    return [entry for entry in matrix.rows[row - 1].tolist() if entry != NOTHING] if row else []


def _write(matrix: Matrix, token: int, entries: np.ndarray) -> None:
    matrix.reserve(1)
    if not matrix.index[token]:
        matrix.used += 1
        matrix.index[token] = matrix.used
    row = matrix.rows[int(matrix.index[token]) - 1]
    row.fill_(NOTHING)
    row[: len(entries)] = torch.from_numpy(entries)


def grow_anywhere(
    matrices: list[Matrix], counts: Tensor, wish: Wish, bit: int, lesson: Lesson | None = None
) -> Trees | None:
    """``Grow`` in Python: what it means."""
    if lesson is not None:
        learn_anywhere(matrices, counts, lesson)
    rows = zip(wish.owner, wish.modes, wish.roots, wish.nodes, wish.depth, strict=True)
    made = [_tree(matrices[owner], counts[mode].numpy(), *limits) for owner, mode, *limits in rows]
    return as_trees(made, wish.roots, bit)


def _tree(matrix: Matrix, cells: np.ndarray, root: int, nodes: int, depth: int) -> list[Node]:
    """The nodes, the most probable path first."""
    made: list[Node] = []
    offers: list[tuple[float, int, int, int, float, int]] = []
    number = itertools.count()  # among equals, the one that was offered first

    def offer(token: int, column: int, level: int, path: float) -> None:
        for rank, entry in enumerate(_entries(matrix, token)):
            right, there = cells[min(level, LEVELS - 1), rank, entry & (1 << CLASS_BITS) - 1].tolist()
            chance = right / there
            heapq.heappush(offers, (-path * chance, next(number), column, entry >> CLASS_BITS, chance, level + 1))

    if nodes > 0 and depth > 0:
        offer(root, 0, 0, 1.0)
    while offers and len(made) < nodes:
        path, _, parent, token, chance, level = heapq.heappop(offers)
        made.append((parent, token, chance))
        if level < depth:
            offer(token, len(made), level, -path)
    return made


def learn_fused(matrices: list[Matrix], counts: Tensor, lesson: Lesson) -> None:
    """``learn_anywhere`` in one call: see models/kernels/recycling.cpp."""
    _used(matrices, torch.ops.saccade.recycling_learn.default(*_taught(matrices, counts, lesson)))


def grow_fused(
    matrices: list[Matrix], counts: Tensor, wish: Wish, bit: int, lesson: Lesson | None = None
) -> Trees | None:
    """``grow_anywhere`` in one call: see models/kernels/recycling.cpp."""
    wanted = (wish.owner, wish.modes, wish.roots, wish.nodes, wish.depth, bit)
    if lesson is None:
        arrays = torch.ops.saccade.recycling_trees.default(*_tensors(matrices), counts, *wanted)
    else:
        both = torch.ops.saccade.recycling_learn_and_grow.default
        *arrays, used = both(*_taught(matrices, counts, lesson), *wanted)
        _used(matrices, used)
    return Trees(*arrays) if arrays[0].shape[1] > 1 else None


def _tensors(matrices: list[Matrix]) -> tuple[list[Tensor], list[Tensor]]:
    return [matrix.index for matrix in matrices], [matrix.rows for matrix in matrices]


def _taught(matrices: list[Matrix], counts: Tensor, lesson: Lesson) -> tuple[Any, ...]:
    """A lesson as the kernel takes it; the matrices have room for it then."""
    for matrix in matrices:
        matrix.reserve(len(lesson.tokens))
    shown = (lesson.tokens, lesson.first, lesson.path, lesson.ids, lesson.logits)
    used, texts = [matrix.used for matrix in matrices], [torch.from_numpy(text) for text in lesson.texts]
    told = (lesson.owner, lesson.modes, texts, *(torch.from_numpy(array) for array in shown))
    return (*_tensors(matrices), used, counts, FADING, EDGES, *told)


def _used(matrices: list[Matrix], rows: list[int]) -> None:
    """So many rows of each are used now."""
    for matrix, count in zip(matrices, rows, strict=True):
        matrix.used = count


def load_recycling() -> tuple[Learn, Grow]:
    """The fastest pair that there is: it is the host's, whatever the device."""
    return (learn_fused, grow_fused) if kernels.load() else (learn_anywhere, grow_anywhere)
