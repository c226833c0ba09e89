"""Triton's attention on a CUDA device, in every dtype, against the keys of each query listed one by one."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention import AttentionBackend, AttentionSpec, load_backend
from models.batch import RaggedBatch
from models.kernels import triton as triton_kernels
from tests.contract.test_attention import (
    TOLERANCE,
    Row,
    Scene,
    attend_one_by_one,
    make_content,
    make_query,
    make_scene,
    rows_of_batch,
    sinks_of,
    specs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
LLAMA_8B = AttentionSpec(num_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, scale=128**-0.5)
TOGETHER, APART = 1, 1 << 40  # programs that keep a device busy: with the first no row is split over programs


def attention(spec: AttentionSpec, dtype: torch.dtype, busy: int) -> AttentionBackend:
    """The backend that is served with, but for how it spreads its work."""
    from models.attention.triton import Spread, TritonAttention, blocks_for

    limit = triton_kernels.shared_memory(DEVICE)
    return TritonAttention(partial(blocks_for, shared_limit=limit), Spread(busy=busy))


def on_device(batch: RaggedBatch) -> RaggedBatch:
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
    return RaggedBatch(**moved)


def run(attend: AttentionBackend, scene: Scene, query: Tensor, spec: AttentionSpec, sinks: bool = False) -> Tensor:
    logits = sinks_of(spec, sinks)
    caches = scene.key_cache.to(DEVICE), scene.value_cache.to(DEVICE)
    return attend(
        query.to(DEVICE), *caches, on_device(scene.batch), spec, None if logits is None else logits.to(DEVICE)
    ).cpu()


def check(rows: list[Row], spec: AttentionSpec, dtype: torch.dtype, seed: int, sinks: bool, root: bool = True) -> None:
    scene = make_scene(rows, spec, dtype, seed, root)
    query = make_query(scene, spec, dtype, seed)
    together = run(attention(spec, dtype, TOGETHER), scene, query, spec, sinks)
    expected = attend_one_by_one(scene, query, spec, sinks_of(spec, sinks))
    torch.testing.assert_close(together.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    apart = run(attention(spec, dtype, APART), scene, query, spec, sinks)
    assert torch.equal(together, apart), "the bits depend on how the work was spread"


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES, ids=str)
@settings(max_examples=10, deadline=None)
@given(rows=rows_of_batch, spec=specs(), sinks=st.booleans(), root=st.booleans(), seed=st.integers(0, 99))
def test_sees_exactly_its_keys(
    dtype: torch.dtype, rows: list[Row], spec: AttentionSpec, sinks: bool, root: bool, seed: int
) -> None:
    # every spec is compiled anew: few head dims
    check(rows, replace(spec, key_dim=64, value_dim=64), dtype, seed, sinks, root)


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (80, 128), (256, 256)], ids=str)
def test_head_dims(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    spec = AttentionSpec(6, 2, *dims, scale=dims[0] ** -0.5)
    check([Row(300, 1, (-1, 0, 0, 1, 2)), Row(0, 90), Row(15, 2)], spec, dtype, 1, True)


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("nodes", [1, 2, 16, 64])
@pytest.mark.parametrize("context", [0, 255, 256, 1024, 10_000])
def test_the_shape_of_a_model_of_8b(dtype: torch.dtype, nodes: int, context: int) -> None:
    rng = random.Random(nodes)
    row = Row(context, 1, (-1, *(rng.randrange(max(0, node - 6), node) for node in range(1, nodes))))
    check([row], LLAMA_8B, dtype, nodes, False)


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES, ids=str)
def test_the_batch_does_not_change_a_rows_bits(dtype: torch.dtype) -> None:
    rows = [Row(1000, 1, (-1, 0, 0, 1, 2, 3)), Row(0, 700), Row(300, 1), Row(63, 3), *[Row(90, 1)] * 40]
    keys, values = make_content(rows, LLAMA_8B, dtype, 7)
    scene = Scene(rows, keys, values, seed=1)
    query = make_query(scene, LLAMA_8B, dtype, 8)
    attend = load_backend("triton", DEVICE, dtype)
    mixed = run(attend, scene, query, LLAMA_8B)
    starts = scene.batch.row_starts.tolist()
    for index in range(5):
        own = slice(starts[index], starts[index + 1])
        alone = Scene([rows[index]], [keys[index]], [values[index]], seed=50 + index)
        assert torch.equal(mixed[own], run(attend, alone, query[own], LLAMA_8B)), index


def test_a_cuda_graph_of_it_replays() -> None:
    scene = make_scene([Row(700, 1, (-1, 0, 1)), Row(5, 9)], LLAMA_8B, torch.bfloat16, 3)
    query = make_query(scene, LLAMA_8B, torch.bfloat16, 3).to(DEVICE)
    caches, batch = (scene.key_cache.to(DEVICE), scene.value_cache.to(DEVICE)), on_device(scene.batch)
    attend = load_backend("triton", DEVICE, torch.bfloat16)
    expected = attend(query, *caches, batch, LLAMA_8B)  # compiles, which cannot be captured
    static, graph = torch.zeros_like(query), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(static, *caches, batch, LLAMA_8B)
    static.copy_(query)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES, ids=str)
def test_auto_takes_it(dtype: torch.dtype) -> None:
    assert type(load_backend("auto", DEVICE, dtype)).__name__ == "TritonAttention"


def test_float64_keeps_the_reference() -> None:
    assert load_backend("auto", DEVICE, torch.float64).__module__ == "models.attention.reference"
