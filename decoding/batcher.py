"""Builds the ragged batch of a step from chains and trees: the only place where a RaggedBatch is put together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import kernels
from models.batch import PAGE_SIZE, RaggedBatch
from models.transfer import upload
from models.tree import Trees, mask_depths


@dataclass(frozen=True)
class Chain:
    """Consecutive tokens of one row, after ``start`` tokens whose K/V is cached."""

    tokens: np.ndarray  # [C] int64
    start: int
    pages: list[int]  # of the row; they reach to the end of its chain and tree

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Nodes:
    """The W tree nodes of a batch, roots included, row after row: the order of RaggedBatch.wanted."""

    row: Tensor  # [W] int64
    column: Tensor  # [W] int64
    depth: Tensor  # [W] int64
    first: Tensor  # [S] int64, packed index of each root
    masks: Tensor  # [S, N] int64, ancestor masks


def build(
    chains: list[Chain], trees: Trees, masks: Tensor, counts: list[int], shift: int = 0
) -> tuple[RaggedBatch, Nodes]:
    """One batch: the trees hang on the ends of the first S chains.

    Args:
        chains: R >= S rows.
        trees: S trees whose padding is on the right; column 0 repeats the chain's last token.
        masks: [S, N] their ancestor masks.
        counts: nodes of each tree, root included (host).
        shift: added to all positions.
    """
    if kernels.serves(trees.tokens.device, torch.float32):
        return _build_fused(chains, trees, masks, counts, shift)
    return build_anywhere(chains, trees, masks, counts, shift)


def _build_fused(
    chains: list[Chain], trees: Trees, masks: Tensor, counts: list[int], shift: int
) -> tuple[RaggedBatch, Nodes]:
    """``build_anywhere`` in one call: see models/kernels/batch.cpp."""
    if len(chains) == 1:
        tokens, pages = chains[0].tokens, chains[0].pages
    else:
        tokens, pages = np.concatenate([c.tokens for c in chains]), [page for c in chains for page in c.pages]
    made = torch.ops.saccade.build_batch.default(
        torch.from_numpy(tokens),
        [c.start for c in chains],
        [len(c.tokens) for c in chains],
        counts,
        pages,
        [len(c.pages) for c in chains],
        trees.tokens,
        masks,
        shift,
    )
    row, column, depth, first = made[12:]
    return RaggedBatch(*made[:12]), Nodes(row, column, depth, first, masks)


def build_anywhere(
    chains: list[Chain], trees: Trees, masks: Tensor, counts: list[int], shift: int = 0
) -> tuple[RaggedBatch, Nodes]:
    """``build`` in NumPy and PyTorch, on any device: what it means. One copy to the device, and no wait for it."""
    lengths = np.array([len(c.tokens) for c in chains])
    starts = np.array([c.start for c in chains])
    extra = np.zeros_like(lengths)  # query tokens after the chain
    extra[: len(counts)] = np.array(counts, dtype=np.int64) - 1
    queries = lengths + extra
    row_starts = np.zeros(len(chains) + 1, dtype=np.int64)
    np.cumsum(queries, out=row_starts[1:])
    row_of = np.repeat(np.arange(len(chains)), queries)
    offset = np.arange(row_starts[-1]) - row_starts[row_of]
    ends = starts + lengths
    index = starts[row_of] + offset  # logical index, for chain tokens also the position
    column = index - ends[row_of] + 1  # column in the tree; <= 0 in the chain, 0 at the root
    table = page_table([c.pages for c in chains])

    tokens = np.zeros(len(index), dtype=np.int64)
    tokens[column <= 0] = np.concatenate([c.tokens for c in chains])
    wanted = np.flatnonzero((column >= 0) & (row_of < len(counts)))
    tree_mask = np.zeros_like(tokens)
    tree_mask[wanted] = 1  # of roots; of the other nodes it is known on the device
    first = np.cumsum([0, *counts[:-1]]) if counts else np.zeros(0, dtype=np.int64)
    there = upload(
        trees.tokens.device,
        *(tokens, index + shift, table[row_of, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE),
        *(np.minimum(index + 1, ends[row_of]).astype(np.int32), tree_mask),
        *(each.astype(np.int32) for each in (row_of, row_starts, ends - 1, table)),
        *(wanted, row_of[wanted], column[wanted], first, ends[row_of[wanted]] - 1 + shift),
    )
    token_ids, positions, slots, visible, masks_of, rows, begins, bases, pages, at, *places = there
    longest, keys = int(queries.max()), int((ends + extra).max())
    batch = RaggedBatch(
        token_ids, positions, slots, visible, masks_of, rows, begins, bases, pages, at, max_query=longest, max_keys=keys
    )
    return batch, _place_nodes(batch, places, trees, masks)


def _place_nodes(batch: RaggedBatch, places: list[Tensor], trees: Trees, masks: Tensor) -> Nodes:
    """Write the wanted nodes into the batch: their row and column [W]; first node [S]; position of their root [W]."""
    row, column, first, base = places
    if trees.width == 1:
        return Nodes(row, column, torch.zeros_like(row), first, masks)
    node_mask = masks[row, column]
    depth = mask_depths(node_mask)
    batch.token_ids[batch.wanted] = trees.tokens[row, column]
    batch.positions[batch.wanted] = base + depth
    batch.tree_mask[batch.wanted] = node_mask
    return Nodes(row, column, depth, first, masks)


def page_table(pages: list[list[int]]) -> np.ndarray:
    """[R, P] int64, padded with page 0."""
    table = np.zeros((len(pages), max(len(p) for p in pages)), dtype=np.int64)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = owned
    return table
