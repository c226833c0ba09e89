"""Passes recorded once for each size of batch, and replayed: a CUDA graph is one launch where a pass has hundreds.

A graph has fixed shapes, so ragged batches are padded to *buckets*. Padding query tokens belong to padding rows, whose
K/V goes to the cache's scratch page and who see nothing else: no real row can tell how it was padded. What a kernel's
launch takes from the host besides shapes, ``max_query`` and ``max_keys``, are upper bounds of the bucket's own.

The results of a replay are overwritten by the next pass of the same model: who keeps them must copy them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.batch import PAGE_SIZE, RaggedBatch
from models.transfer import upload

logger = logging.getLogger("saccade.graphs")

ROW_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128)
TOKEN_EDGES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FEWEST_KEYS = 512  # edges of the number of keys are this and its doubles
MAX_GRAPHS = 512  # of one model; the least recently used is given up beyond

Tensors = tuple[Tensor, ...]
Replay = Callable[[], Tensors]


class Capture(Protocol):
    """Makes a pass over fixed tensors repeatable."""

    def __call__(self, run: Callable[[], Tensors]) -> Replay:
        """Record ``run``; what is returned repeats it on the same memory, its results always in the same tensors.

        Raises:
            RuntimeError: the device cannot record this.
        """
        ...


class CudaCapture:
    """CUDA graphs, all in one memory pool: they never run at one time, so what is only passed through is shared."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensors]) -> Replay:
        """See ``Capture``."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                run()  # compiles kernels and makes workspaces, which cannot be recorded
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # what other threads ask of the driver meanwhile is no reason to give up
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()

        def replay() -> Tensors:
            graph.replay()
            return outputs

        return replay


class EagerCapture:
    """Runs the pass anew on the same tensors, results in the same memory: buckets and aliasing without a device."""

    def __call__(self, run: Callable[[], Tensors]) -> Replay:
        """See ``Capture``."""
        outputs = tuple(result.clone() for result in run())

        def replay() -> Tensors:
            for kept, result in zip(outputs, run(), strict=True):
                kept.copy_(result)
            return outputs

        return replay


@dataclass(frozen=True)
class Bucket:
    """The size of a padded batch."""

    rows: int
    tokens: int
    queries: int  # at least the longest row's query tokens, padding rows included: 1, or all of them
    keys: int  # at least the longest row's keys; whole pages

    @staticmethod
    def of(batch: RaggedBatch) -> Bucket | None:
        """The smallest bucket that holds the batch; None if it is larger than all of them."""
        rows, tokens = batch.num_rows, batch.num_tokens
        keys = FEWEST_KEYS
        while keys < batch.max_keys:
            keys *= 2
        for wide in TOKEN_EDGES:
            for high in ROW_EDGES:
                spare, hosts = wide - tokens, high - rows
                # padding tokens need a row of their own, and padding rows a token
                if min(spare, hosts) >= 0 and (spare == hosts == 0 or 0 < hosts <= spare):
                    each_one = batch.max_query == 1 and spare == hosts
                    return Bucket(high, wide, 1 if each_one else wide, keys)
        return None


@dataclass(frozen=True)
class Filling:
    """How a batch of R rows and T tokens is written to static tensors: parts in turn, the batch's and the padding's."""

    longs: list[Tensor]  # views of token_ids, positions, slots, tree_mask: the first T entries and the rest of each
    ints: list[Tensor]  # of visible, row_of, tree_base, row_starts
    long_padding: tuple[Tensor, ...]
    int_padding: tuple[Tensor, ...]


class StaticInputs:
    """One bucket's tensors, always at the same addresses.

    Args:
        scratch_page: where padding rows write; no sequence owns it.
    """

    def __init__(self, bucket: Bucket, scratch_page: int, device: torch.device) -> None:
        self.bucket = bucket
        self.by_token: Tensors = ()
        self.by_row: Tensors = ()
        self._scratch = scratch_page
        self._fillings: dict[tuple[int, int], Filling] = {}

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        tokens, rows = bucket.tokens, bucket.rows
        self.batch = RaggedBatch(
            token_ids=zeros(tokens, dtype=torch.int64),
            positions=zeros(tokens, dtype=torch.int64),
            slots=zeros(tokens, dtype=torch.int64),
            visible=zeros(tokens),
            tree_mask=zeros(tokens, dtype=torch.int64),
            row_of=zeros(tokens),
            row_starts=zeros(rows + 1),
            tree_base=zeros(rows),
            page_table=zeros(rows, bucket.keys // PAGE_SIZE),
            wanted=torch.arange(tokens, device=device),
            max_query=bucket.queries,
            max_keys=bucket.keys,
        )

    def fill(self, batch: RaggedBatch, by_token: Tensors, by_row: Tensors) -> None:
        """Copy a batch and what comes with its tokens and its rows, and pad: a few launches, no wait."""
        mine, rows = self.batch, batch.num_rows
        how = self._filling(rows, batch.num_tokens)
        longs = (batch.token_ids, batch.positions, batch.slots, batch.tree_mask)
        ints = (batch.visible, batch.row_of, batch.tree_base, batch.row_starts)
        torch._foreach_copy_(how.longs, [part for pair in zip(longs, how.long_padding) for part in pair])
        torch._foreach_copy_(how.ints, [part for pair in zip(ints, how.int_padding) for part in pair])
        # what stands behind a row's own pages is not looked at, so an earlier batch's may stay
        width = min(batch.page_table.shape[1], mine.page_table.shape[1])
        mine.page_table[:rows, :width].copy_(batch.page_table[:, :width])
        if rows < self.bucket.rows:
            mine.page_table[rows:].fill_(self._scratch)
        if not self.by_token and not self.by_row:
            self.by_token = tuple(x.new_zeros(self.bucket.tokens, *x.shape[1:]) for x in by_token)
            self.by_row = tuple(x.new_zeros(self.bucket.rows, *x.shape[1:]) for x in by_row)
        for kept, given in zip(self.by_token + self.by_row, by_token + by_row, strict=True):
            kept[: len(given)].copy_(given)

    def _filling(self, rows: int, tokens: int) -> Filling:
        if (rows, tokens) not in self._fillings:
            mine = self.batch
            lengths = (tokens, tokens, rows, rows + 1)
            longs = [mine.token_ids, mine.positions, mine.slots, mine.tree_mask]
            ints = zip((mine.visible, mine.row_of, mine.tree_base, mine.row_starts), lengths, strict=True)
            long_padding, int_padding = self._padding(rows, tokens)
            self._fillings[rows, tokens] = Filling(
                [part for each in longs for part in each.tensor_split([tokens])],
                [part for each, length in ints for part in each.tensor_split([length])],
                tuple(long_padding),
                tuple(int_padding),
            )
        return self._fillings[rows, tokens]

    def _padding(self, rows: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """What stands behind a batch of this size: int64 (ids, positions, slots, masks) and int32 (the others).

        A padding row has a context of one token and a chain whose tokens see that token and the first of their own.
        """
        spare, hosts = self.bucket.tokens - tokens, self.bucket.rows - rows
        sizes = np.array([spare // hosts + (row < spare % hosts) for row in range(hosts)], dtype=np.int32)
        logical = np.concatenate([np.arange(1, 1 + size) for size in sizes] or [np.zeros(0, dtype=np.int64)])
        slots = self._scratch * PAGE_SIZE + logical % PAGE_SIZE
        longs = np.stack([np.zeros_like(slots), np.ones_like(slots), slots, np.zeros_like(slots)])
        ints = [
            np.full(spare, 2, dtype=np.int32),
            np.repeat(np.arange(rows, rows + hosts, dtype=np.int32), sizes),
            sizes,  # the last token of a chain of n after one token stands at logical index n
            tokens + np.cumsum(sizes, dtype=np.int32),
        ]
        there = upload(self.batch.token_ids.device, longs, *ints)
        return list(there[0].unbind(0)), there[1:]


Pass = Callable[[RaggedBatch, Tensors, Tensors], Tensors]
"""(batch, tensors [T, ...], tensors [R, ...]) -> tensors [T, ...]; nothing in it may wait for the device."""


@dataclass(frozen=True)
class Graph:
    """A recorded pass."""

    inputs: StaticInputs
    replay: Replay


class GraphedPasses:
    """The recorded passes of one model. A batch beyond the buckets, or a device that refuses, runs as it is."""

    def __init__(self, capture: Capture) -> None:
        self._capture: Capture | None = capture
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    def run(
        self,
        key: Hashable,
        make: Pass,
        scratch_page: int,
        batch: RaggedBatch,
        by_token: Tensors = (),
        by_row: Tensors = (),
    ) -> Tensors:
        """``make(batch, by_token, by_row)``, by replay where that is possible.

        Args:
            key: names ``make``: passes of equal keys do the same to the same memory.
            scratch_page: of the cache that the pass writes to.
        """
        bucket = Bucket.of(batch) if self._capture is not None else None
        if bucket is None:
            return make(batch, by_token, by_row)
        graph = self._graphs.get((key, bucket))
        if graph is None:
            inputs = StaticInputs(bucket, scratch_page, batch.token_ids.device)
            inputs.fill(batch, by_token, by_row)
            graph = self._record(make, inputs)
            if graph is None:
                return make(batch, by_token, by_row)
            self._graphs[key, bucket] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end((key, bucket))
        graph.inputs.fill(batch, by_token, by_row)
        return tuple(result[: batch.num_tokens] for result in graph.replay())

    def _record(self, make: Pass, inputs: StaticInputs) -> Graph | None:
        assert self._capture is not None
        try:
            return Graph(inputs, self._capture(lambda: make(inputs.batch, inputs.by_token, inputs.by_row)))
        except RuntimeError as error:
            self._capture = None
            self._graphs.clear()
            logger.warning(
                "CUDA graphs cannot be recorded here, so every kernel of a pass is launched by itself: small batches "
                "will be slower. Steps give the same results. The reason: %s",
                error,
            )
            return None
