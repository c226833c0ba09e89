"""Paged tree attention on CUDA, in Triton (models/kernels/triton/attention.py): pages are read in place.

The context is cut at fixed logical indexes, and how a tile of queries and a block of keys look depends on the layer
alone. So a query's result does not depend on the batch: neither on its mates nor on how the work was spread over the
device. A tree node's bits do differ from those of the same token in a chain: its ancestors stand at other logical
indexes, and in other blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from models.attention import AttentionBackend, AttentionSpec
from models.batch import PAGE_SIZE, RaggedBatch
from models.kernels.triton import shared_memory
from models.kernels.triton.attention import attend_tiles, merge_splits


@dataclass(frozen=True)
class Spread:
    """How work is spread over the device; ``split`` alone enters into the bits of a result."""

    split: int = 256  # keys between two boundaries; a multiple of every block of keys
    busy: int = 1024  # so many programs without splitting keep a device busy (an H100 has 132 multiprocessors)
    scratch_bytes: int = 1 << 27  # beyond this, results of splits are not worth their memory


@dataclass(frozen=True)
class Blocks:
    """The shape of one program's work and how it is compiled; a function of the layer, never of the batch."""

    vectors: int  # rows of the products: query tokens x heads of a K/V head
    keys: int
    key_dim: int  # padded
    value_dim: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory that queries and ``num_stages`` blocks of keys and values take, about."""
        return itemsize * (self.vectors * self.key_dim + self.num_stages * self.keys * (self.key_dim + self.value_dim))


def blocks_for(spec: AttentionSpec, dtype: torch.dtype, shared_limit: int) -> Blocks:
    """The blocks of a layer.

    64 rows fill the matrix units of every device since 2020 and cost a single query nothing: it waits for memory.

    Args:
        shared_limit: shared memory of one program, bytes.
    """
    key_dim, value_dim = _padded(spec.key_dim), _padded(spec.value_dim)
    widest = max(key_dim, value_dim) * dtype.itemsize
    if dtype.itemsize == 4:  # no matrix units: tests, not speed
        keys = 16
    else:
        keys = 64 if widest <= 256 else 32 if widest <= 512 else 16
    vectors = max(64, _padded(spec.num_heads // spec.num_kv_heads))
    num_warps = 4 if widest <= 128 else 8
    for num_stages in (3, 2):
        blocks = Blocks(vectors, keys, key_dim, value_dim, num_warps, num_stages)
        if blocks.shared_bytes(dtype.itemsize) <= shared_limit:
            return blocks
    return Blocks(vectors, keys, key_dim, value_dim, num_warps, 1)


def _padded(size: int) -> int:
    """The next power of two that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def load(device: torch.device) -> AttentionBackend:
    """The backend for ``device``; a CPU has it in Triton's interpreter only, which knows no limits."""
    limit = shared_memory(device) if device.type == "cuda" else 1 << 30
    return TritonAttention(partial(blocks_for, shared_limit=limit))


class TritonAttention:
    """The backend, for float32, bfloat16 and float16, on one device.

    Args:
        choose: the blocks of a layer: ``blocks_for``, what is best on the device at hand, or one choice in a test.
    """

    def __init__(self, choose: Callable[[AttentionSpec, torch.dtype], Blocks], spread: Spread | None = None) -> None:
        self._choose = choose
        self._spread = spread or Spread()
        self._blocks: dict[tuple[AttentionSpec, torch.dtype], Blocks] = {}

    def __call__(
        self,
        query: Tensor,  # [T, Hq, D]
        keys: Tensor,  # [S, Hkv, D]
        values: Tensor,  # [S, Hkv, Dv]
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: Tensor | None = None,  # [Hq]
    ) -> Tensor:  # [T, Hq, Dv]
        if query.stride(2) != 1:
            query = query.contiguous()
        blocks = self._blocks.get((spec, query.dtype))
        if blocks is None:
            blocks = self._blocks[spec, query.dtype] = self._choose(spec, query.dtype)
            # later, compiling the other way of spreading work would hold up requests
            one, split = _one_token(query.device), self._spread.split
            for splits in (1, 2):
                self._run(blocks, splits, query[:1], keys, values, replace(one, max_keys=splits * split), spec, sinks)
        return self._run(blocks, self._splits(batch, spec, blocks), query, keys, values, batch, spec, sinks)

    def _run(
        self,
        blocks: Blocks,
        splits: int,  # programs along the context: 1, or as many as there are splits
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: Tensor | None,
    ) -> Tensor:
        tokens, group = batch.num_tokens, spec.num_heads // spec.num_kv_heads
        out = query.new_empty((tokens, spec.num_heads, spec.value_dim))
        partial = (splits, tokens, spec.num_heads) if splits > 1 else (0,)
        peaks_and_totals = query.new_empty((*partial, 2), dtype=torch.float32)
        sums = query.new_empty((*partial, spec.value_dim), dtype=torch.float32)
        given_sinks = query if sinks is None else sinks  # never read without SINKS
        shared = {
            "HEADS": spec.num_heads,
            "GROUP": group,
            "WINDOW": spec.window or 0,
            "FIRST_KEY": spec.first_key,
            "SINKS": sinks is not None,
            "VALUE_DIM": spec.value_dim,
            "VALUE_BLOCK": blocks.value_dim,
            "SPLIT": self._spread.split,
            "enable_fp_fusion": False,  # both ways of merging must round alike
        }
        attend_tiles[(_tiles(batch, spec, blocks), spec.num_kv_heads, splits)](
            query,
            keys,
            values,
            batch.visible,
            batch.tree_mask,
            batch.positions,
            batch.row_starts,
            batch.tree_base,
            batch.page_table,
            given_sinks,
            out,
            peaks_and_totals,
            sums,
            tokens,
            batch.num_rows,
            batch.page_table.stride(0),
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            SCALE=spec.scale,
            SOFT_CAP=spec.soft_cap or 0.0,
            PAGE=PAGE_SIZE,
            KEY_DIM=spec.key_dim,
            KEY_BLOCK=blocks.key_dim,
            BLOCK_M=blocks.vectors,
            BLOCK_N=blocks.keys,
            SPLIT_PROGRAMS=splits > 1,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **shared,
        )
        if splits > 1:
            merge_splits[(tokens, spec.num_kv_heads)](
                batch.visible,
                batch.tree_mask,
                batch.positions,
                batch.row_of,
                batch.tree_base,
                given_sinks,
                out,
                peaks_and_totals,
                sums,
                tokens,
                GROUP_BLOCK=1 << (group - 1).bit_length(),
                num_warps=2,
                **shared,
            )
        return out

    def _splits(self, batch: RaggedBatch, spec: AttentionSpec, blocks: Blocks) -> int:
        """Programs along the context: one a split, or 1 where the device is busy anyway."""
        splits = -(-batch.max_keys // self._spread.split)
        programs = _tiles(batch, spec, blocks) * spec.num_kv_heads
        scratch = splits * batch.num_tokens * spec.num_heads * (spec.value_dim + 2) * 4
        return 1 if programs >= self._spread.busy or scratch > self._spread.scratch_bytes else splits


def _tiles(batch: RaggedBatch, spec: AttentionSpec, blocks: Blocks) -> int:
    """At least as many as the batch has, from what the host knows."""
    group = spec.num_heads // spec.num_kv_heads
    return batch.num_tokens // (blocks.vectors // group) + batch.num_rows


def _one_token(device: torch.device) -> RaggedBatch:
    """The smallest batch: a root that sees itself, in slot 0."""
    zeros = torch.zeros(1, dtype=torch.int64, device=device)
    ones, narrow = torch.ones_like(zeros), zeros.int()
    return RaggedBatch(
        token_ids=zeros,
        positions=zeros,
        slots=zeros,
        visible=ones.int(),
        tree_mask=ones,
        row_of=narrow,
        row_starts=torch.arange(2, dtype=torch.int32, device=device),
        tree_base=narrow,
        page_table=narrow[None],
        wanted=zeros,
        max_query=1,
        max_keys=1,
    )
