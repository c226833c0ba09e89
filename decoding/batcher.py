"""Builds the ragged batch of a step from chains and trees: the only place where a RaggedBatch is put together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import kernels
from models.batch import PAGE_SIZE, RaggedBatch
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


def build(chains: list[Chain], trees: Trees, masks: Tensor, counts: list[int]) -> tuple[RaggedBatch, Nodes]:
    """One batch: the trees hang on the ends of the first S chains.

    Args:
        chains: R >= S rows.
        trees: S trees whose padding is on the right; column 0 repeats the chain's last token.
        masks: [S, N] their ancestor masks.
        counts: nodes of each tree, root included (host).
    """
    if kernels.serves(trees.tokens.device, torch.float32):
        return _build_fused(chains, trees, masks, counts)
    return build_anywhere(chains, trees, masks, counts)


def _build_fused(chains: list[Chain], trees: Trees, masks: Tensor, counts: list[int]) -> tuple[RaggedBatch, Nodes]:
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
    )
    row, column, depth, first = made[12:]
    return RaggedBatch(*made[:12]), Nodes(row, column, depth, first, masks)


def build_anywhere(chains: list[Chain], trees: Trees, masks: Tensor, counts: list[int]) -> tuple[RaggedBatch, Nodes]:
    """``build`` in NumPy and PyTorch, on any device: what it means."""
    device = trees.tokens.device
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
    slots = table[row_of, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE

    tokens = np.zeros(len(index), dtype=np.int64)
    tokens[column <= 0] = np.concatenate([c.tokens for c in chains])
    decides = row_of < len(counts)
    wanted = np.flatnonzero((column >= 0) & decides)

    def upload(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(array).to(device, dtype)

    node_row, node_column = upload(row_of[wanted]), upload(column[wanted])
    node_mask = masks[node_row, node_column]
    depth = mask_depths(node_mask)
    at = upload(wanted)
    positions, tree_mask = upload(index), torch.zeros(len(index), dtype=torch.int64, device=device)
    token_ids = upload(tokens)
    if trees.width > 1:
        token_ids[at] = trees.tokens[node_row, node_column]
        positions[at] = upload(ends[row_of[wanted]] - 1) + depth
    tree_mask[at] = node_mask
    batch = RaggedBatch(
        token_ids=token_ids,
        positions=positions,
        slots=upload(slots),
        visible=upload(np.minimum(index + 1, ends[row_of]), torch.int32),
        tree_mask=tree_mask,
        row_of=upload(row_of, torch.int32),
        row_starts=upload(row_starts, torch.int32),
        tree_base=upload(ends - 1, torch.int32),
        page_table=upload(table, torch.int32),
        wanted=at,
        max_query=int(queries.max()),
        max_keys=int((ends + extra).max()),
    )
    first = np.cumsum([0, *counts[:-1]]) if counts else np.zeros(0, dtype=np.int64)
    return batch, Nodes(node_row, node_column, depth, upload(first), masks)


def page_table(pages: list[list[int]]) -> np.ndarray:
    """[R, P] int64, padded with page 0."""
    table = np.zeros((len(pages), max(len(p) for p in pages)), dtype=np.int64)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = owned
    return table
