"""Trees of the host, from nodes that a search lists row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.tree import NO_PARENT, Trees

Node = tuple[int, int, float]  # column of the parent, token, confidence
TreeArrays = tuple[Tensor, Tensor, Tensor, Tensor]  # fields of Trees


def as_trees(tries: Sequence[Sequence[Node]], roots: Sequence[int], bit: int) -> Trees | None:
    """``trees_of``; None without a node."""
    return trees_of(tries, roots, bit) if any(tries) else None


def trees_of(tries: Sequence[Sequence[Node]], roots: Sequence[int], bit: int) -> Trees:
    """Trees [R, N] of each row's nodes, the first of which gets column 1; parents come first.

    What models/kernels/host_trees.h does for the kernels.

    Args:
        roots: [R] the rows' last tokens.
        bit: the drafter's.
    """
    size = (len(tries), 1 + max((len(trie) for trie in tries), default=0))
    tokens, parents, confidence = np.full(size, -1), np.full(size, NO_PARENT), np.zeros(size, dtype=np.float32)
    tokens[:, 0], confidence[:, 0] = roots, 1.0
    for row, trie in enumerate(tries):
        if trie:
            used = slice(1, 1 + len(trie))
            parents[row, used], tokens[row, used], confidence[row, used] = zip(*trie, strict=True)
    source = (parents != NO_PARENT).astype(np.int64) << bit
    return Trees(*(torch.from_numpy(array) for array in (tokens, parents, confidence, source)))
