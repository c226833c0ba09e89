"""Paged tree attention on CPUs, in C++ (models/kernels/attention.cpp): pages are read in place.

A query's result is a function of the query and the keys it sees, bit for bit: whether they are a chain or a path in a
tree, in which pages they lie, with whom the batch is shared and on how many threads it runs changes nothing.
"""

from __future__ import annotations

from torch import Tensor

from models import kernels
from models.attention import AttentionSpec
from models.batch import RaggedBatch


class CpuAttention:
    """An ``AttentionBackend`` for float32, bfloat16, float16 and float64.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self) -> None:
        self._kernel = kernels.required().attend.default

    def __call__(
        self,
        query: Tensor,  # [T, Hq, D]
        keys: Tensor,  # [S, Hkv, D]
        values: Tensor,  # [S, Hkv, Dv]
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: Tensor | None = None,  # [Hq]
    ) -> Tensor:  # [T, Hq, Dv]
        return self._kernel(  # type: ignore[no-any-return]
            query,
            keys,
            values,
            batch.visible,
            batch.tree_mask,
            batch.positions,
            batch.row_starts,
            batch.tree_base,
            batch.page_table,
            sinks,
            spec.scale,
            spec.soft_cap,
            spec.window,
            spec.first_key,
        )
