"""Triton's attention in its interpreter, in float32: tests/unit/test_triton.py runs this file in a process of its own.

``SACCADE_TRITON_CASES`` draws more batches than the few of every day.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention import AttentionBackend, AttentionSpec, load_backend
from models.attention.triton import Blocks, Spread, TritonAttention
from tests.contract.test_attention import (
    CPU,
    Row,
    Scene,
    attend_one_by_one,
    make_content,
    make_query,
    make_scene,
    sinks_of,
    test_nan_of_one_row_stays_there,
    test_query_may_be_a_view_of_the_fused_projection,
)

__all__ = ["test_nan_of_one_row_stays_there", "test_query_may_be_a_view_of_the_fused_projection"]

CASES = int(os.environ.get("SACCADE_TRITON_CASES", "8"))
TOGETHER, APART = 1, 1 << 40  # programs that keep a device busy: with the first no row is split over programs


def attention(vectors: int, keys: int, split: int, busy: int) -> TritonAttention:
    def blocks(spec: AttentionSpec, dtype: torch.dtype) -> Blocks:
        group = spec.num_heads // spec.num_kv_heads
        key_dim, value_dim = (max(16, 1 << (dim - 1).bit_length()) for dim in (spec.key_dim, spec.value_dim))
        return Blocks(max(vectors, 1 << (group - 1).bit_length()), keys, key_dim, value_dim, 4, 2)

    return TritonAttention(blocks, Spread(split, busy))


def run(attend: AttentionBackend, scene: Scene, query: Tensor, spec: AttentionSpec, sinks: bool = False) -> Tensor:
    return attend(query, scene.key_cache, scene.value_cache, scene.batch, spec, sinks_of(spec, sinks))


@pytest.fixture
def backend() -> AttentionBackend:
    return load_backend("triton", CPU, torch.float32)


edges = st.sampled_from([0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 150])


@st.composite
def rows_of_batch(draw: st.DrawFn) -> list[Row]:
    """One to three rows: chains and trees of 1 to 64 nodes, seldom both large."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        chain, nodes = draw(
            st.sampled_from([(1, 1), (1, 2), (1, 7), (1, 17), (1, 64), (2, 5), (16, 1), (17, 3), (40, 1)])
        )
        rng = random.Random(draw(st.integers(0, 999)))
        back = draw(st.sampled_from([1, 3, 64]))
        parents = (-1, *(rng.randrange(max(0, node - back), node) for node in range(1, nodes)))
        rows.append(Row(draw(edges), chain, parents))
    return rows


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    group, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (3, 1), (2, 2), (1, 3)]))
    key_dim, value_dim = draw(st.sampled_from([(16, 16), (64, 64), (24, 40), (5, 3)]))
    return AttentionSpec(
        num_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=key_dim**-0.5,
        window=draw(st.sampled_from([None, None, None, 1, 5, 40, 70])),
        soft_cap=draw(st.sampled_from([None, None, 2.0, 50.0])),
        first_key=draw(st.sampled_from([0, 0, 1])),
    )


@settings(max_examples=CASES, deadline=None)
@given(
    rows=rows_of_batch(),
    spec=specs(),
    sinks=st.booleans(),
    root=st.booleans(),
    sizes=st.sampled_from([(16, 16, 32), (16, 32, 64), (64, 64, 64), (32, 16, 128), (64, 32, 64)]),
    seed=st.integers(0, 99),
)
def test_sees_exactly_its_keys(
    rows: list[Row], spec: AttentionSpec, sinks: bool, root: bool, sizes: tuple[int, int, int], seed: int
) -> None:
    scene = make_scene(rows, spec, torch.float32, seed, root)
    query = make_query(scene, spec, torch.float32, seed)
    together = run(attention(*sizes, TOGETHER), scene, query, spec, sinks)
    expected = attend_one_by_one(scene, query, spec, sinks_of(spec, sinks))
    torch.testing.assert_close(together.double(), expected, rtol=2e-5, atol=2e-5)
    apart = run(attention(*sizes, APART), scene, query, spec, sinks)
    assert torch.equal(together, apart), "the bits depend on how the work was spread"


@pytest.mark.parametrize(
    ("context", "nodes", "window"),
    [(1023, 1, None), (1024, 20, None), (1024, 64, 500), (10_000, 1, None), (10_000, 6, None), (10_000, 4, 3000)],
)
def test_long_contexts(context: int, nodes: int, window: int | None) -> None:
    spec = AttentionSpec(4, 1, 32, 32, 0.2, window=window)
    rng = random.Random(nodes)
    scene = make_scene(
        [Row(context, 1, (-1, *(rng.randrange(node) for node in range(1, nodes))))], spec, torch.float32, nodes
    )
    query = make_query(scene, spec, torch.float32, 4)
    expected = attend_one_by_one(scene, query, spec, None)
    for busy in (TOGETHER, APART):
        out = run(attention(64, 64, 256, busy), scene, query, spec)
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


def test_the_batch_does_not_change_a_rows_bits() -> None:
    spec = AttentionSpec(4, 2, 32, 32, 0.2)
    rows = [Row(100, 1, (-1, 0, 0, 1, 2, 3)), Row(0, 40), Row(300, 1), Row(63, 3)]
    keys, values = make_content(rows, spec, torch.float32, 7)
    scene = Scene(rows, keys, values, seed=1)
    query = make_query(scene, spec, torch.float32, 8)
    mixed = run(attention(16, 32, 64, TOGETHER), scene, query, spec)
    starts = scene.batch.row_starts.tolist()
    for index, row in enumerate(rows):
        own = slice(starts[index], starts[index + 1])
        alone = Scene([row], [keys[index]], [values[index]], seed=50 + index)  # in other pages, too
        for busy in (TOGETHER, APART):
            assert torch.equal(mixed[own], run(attention(16, 32, 64, busy), alone, query[own], spec)), index


def test_bounds_of_a_padded_batch_change_no_bits() -> None:
    """CUDA graphs have batches with more keys than any row has, and wider page tables."""
    spec = AttentionSpec(2, 1, 16, 16, 0.25)
    scene = make_scene([Row(70, 1, (-1, 0, 1)), Row(5, 9)], spec, torch.float32, 3)
    query = make_query(scene, spec, torch.float32, 3)
    attend = attention(16, 16, 32, APART)
    out = run(attend, scene, query, spec)
    batch = scene.batch
    wider = torch.nn.functional.pad(batch.page_table, (0, 40))
    scene.batch = type(batch)(**(vars(batch) | {"page_table": wider, "max_query": 64, "max_keys": 500}))
    assert torch.equal(run(attend, scene, query, spec), out)


def test_more_rows_than_are_looked_up_at_once() -> None:
    spec = AttentionSpec(2, 1, 16, 16, 0.25)
    scene = make_scene([Row(index % 5, 1) for index in range(140)], spec, torch.float32, 3)
    query = make_query(scene, spec, torch.float32, 3)
    expected = attend_one_by_one(scene, query, spec, None)
    out = run(attention(16, 16, 32, TOGETHER), scene, query, spec)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


def test_float16_in_the_blocks_of_a_device() -> None:
    spec = AttentionSpec(8, 2, 64, 64, 0.125)
    scene = make_scene([Row(290, 1, (-1, 0, 0, 1, 2)), Row(0, 20)], spec, torch.float16, 6)
    query = make_query(scene, spec, torch.float16, 6)
    expected = attend_one_by_one(scene, query, spec, None)
    out = run(load_backend("triton", CPU, torch.float16), scene, query, spec)
    torch.testing.assert_close(out.double(), expected, rtol=3e-3, atol=3e-3)
