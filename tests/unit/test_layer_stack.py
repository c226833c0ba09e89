"""A fused stack of layers has the bits of its operations called one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import kernels
from models.attention import load_backend
from models.batch import MAX_TREE, RaggedBatch
from models.config import ModelConfig
from models.decoder import DecoderLayer, LayerStack
from models.kernels.fused_stack import fuses
from models.kv_cache import KVCache, KVSpec
from models.layers.int8 import int8_packing
from models.layers.linear import OneDnnProduct, PackedProduct
from models.layers.ops import load_ops
from models.layers.rope import RopeConfig, rope_table
from tests.paged import PagedRun

CPU = torch.device("cpu")
LAYERS = 3
CONFIG = ModelConfig(
    vocab_size=1,
    hidden_size=96,
    num_layers=LAYERS,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    mlp_size=200,
    rope=RopeConfig(24),
    max_len=128,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed heads": {"qk_norm": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "one head each": {"num_kv_heads": 6, "activation": "gelu"},
    "windows": {"windows": (None, 4, 9)},
    "soft cap": {"attention_soft_cap": 5.0, "attention_scale": 0.7, "activation": "gelu_tanh"},
    "odd sizes": {"hidden_size": 67, "head_dim": 10, "rope": RopeConfig(6), "mlp_size": 33},
    "wide": {"hidden_size": 320, "mlp_size": 1100, "num_layers": 2},
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    assert kernels.load(), "the kernels must work where tests run"
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@dataclass
class Model:
    """What PagedRun asks of a model, to build batches and a cache."""

    kv_spec: KVSpec
    dtype: torch.dtype
    device: torch.device = CPU


def make_stack(
    config: ModelConfig, dtype: torch.dtype, *, final_norm: bool = True, first: int = 0, **layer_options: Any
) -> LayerStack:
    """Random weights; the first layer takes ``layer_options``."""
    first_key = layer_options.get("first_key", 0)
    layers = [
        DecoderLayer(config, index, CPU, dtype, **(layer_options if index == 0 else {"first_key": first_key}))
        for index in range(config.num_layers)
    ]
    for layer in layers:
        for name, weight in layer.weights().items():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
    rope = rope_table(config.rope, config.max_len, config.max_len + MAX_TREE, CPU, dtype)
    norm = torch.randn(config.hidden_size).to(dtype) if final_norm else None
    return LayerStack(layers, norm, rope, load_ops(CPU, dtype), load_backend("auto", CPU, dtype), first)


def batches(run: PagedRun) -> Iterator[RaggedBatch]:
    """Prompts of three rows; then a tree on the first, a chunk and a token; then one token alone."""
    yield run.batch({0: [0] * 37, 1: [0], 2: [0] * 5})
    run.lengths = [37, 1, 5]
    yield run.batch({0: [0] * 7, 1: [0] * 9, 2: [0]}, {0: [-1, 0, 0, 1, 1, 2, 5]})
    run.lengths = [38, 10, 6]
    yield run.batch({0: [0]})


def check_equal(stack: LayerStack, config: ModelConfig, taps: tuple[int, ...] = (), inputs: int | None = None) -> None:
    """``run`` and ``run_each`` on caches of their own: results and caches, bit for bit."""
    assert fuses(stack.layers, load_ops(CPU, dtype_of(stack)), load_backend("auto", CPU, dtype_of(stack)))
    dtype = dtype_of(stack)
    spec = KVSpec(config.num_layers + 2, config.num_kv_heads, config.head_dim, config.head_dim)
    run, other = (PagedRun(Model(spec, dtype), rows=3, capacity=64) for _ in range(2))  # type: ignore[arg-type]
    for batch in batches(run):
        stream = torch.randn(batch.num_tokens, config.hidden_size).to(dtype)
        hidden = None if inputs is None else torch.randn(batch.num_tokens, inputs + 3).to(dtype)[:, :inputs]
        fused = stack.run(stream.clone(), batch, run.cache, taps, hidden)
        each = stack.run_each(stream.clone(), batch, other.cache, taps, hidden)
        assert fused[0].isfinite().all()
        assert torch.equal(fused[0], each[0])
        assert torch.equal(fused[1], each[1])
        assert sorted(fused[2]) == sorted(each[2]) == sorted(taps)
        assert all(torch.equal(fused[2][tap], each[2][tap]) for tap in taps)
        assert torch.equal(run.cache.keys, other.cache.keys)
        assert torch.equal(run.cache.values, other.cache.values)


def dtype_of(stack: LayerStack) -> torch.dtype:
    return stack.layers[0].mlp_norm.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_of_the_operations_one_by_one(variant: str, dtype: torch.dtype) -> None:
    config = replace(CONFIG, **VARIANTS[variant])
    stack = make_stack(config, dtype)
    stack.pack()
    check_equal(stack, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["biases", "odd sizes"])
def test_int8_weights(variant: str, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    config = replace(CONFIG, **VARIANTS[variant])
    stack = make_stack(config, dtype)
    stack.pack(int8_packing(CPU, dtype))
    check_equal(stack, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taps(dtype: torch.dtype) -> None:
    stack = make_stack(CONFIG, dtype)
    stack.pack()
    check_equal(stack, CONFIG, taps=(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafters_layers(dtype: torch.dtype) -> None:
    """EAGLE's: no first norm, no final one, no key at slot 0, an attention that reads something wider."""
    stack = make_stack(CONFIG, dtype, final_norm=False, first=2, input_norm=False, first_key=1)
    stack.pack()
    check_equal(stack, CONFIG, taps=(2,))
    wide = make_stack(CONFIG, dtype, first=1, input_norm=False, first_key=1, inputs=2 * 96)
    wide.pack()
    check_equal(wide, CONFIG, inputs=2 * 96)


@pytest.mark.parametrize("count", [2, 3])
def test_threads_do_not_change_a_bit(count: int) -> None:
    config = replace(CONFIG, **VARIANTS["wide"])
    stack = make_stack(config, torch.bfloat16)
    stack.pack()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        check_equal(stack, config, taps=(1,))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_ours_runs_operation_by_operation() -> None:
    cpu, attention = load_ops(CPU, torch.float32), load_backend("auto", CPU, torch.float32)
    stack = make_stack(CONFIG, torch.float32)
    assert not fuses(stack.layers, cpu, attention)  # not packed yet
    stack.layers[0].o.pack(OneDnnProduct)
    stack.pack(PackedProduct)
    assert not fuses(stack.layers, cpu, attention)
    del stack.layers[0]
    assert fuses(stack.layers, cpu, attention)
    assert not fuses(stack.layers, load_ops(CPU, torch.float32, "torch"), attention)
    assert not fuses(stack.layers, cpu, load_backend("reference", CPU, torch.float32))
    double = make_stack(CONFIG, torch.float64)
    double.pack()
    assert not fuses(double.layers, cpu, attention)


def packed() -> tuple[LayerStack, PagedRun, RaggedBatch, Tensor]:
    stack = make_stack(CONFIG, torch.float32)
    stack.pack()
    run = PagedRun(Model(KVSpec(LAYERS, 2, 24, 24), torch.float32), capacity=64)  # type: ignore[arg-type]
    return stack, run, run.batch({0: [0] * 5}), torch.randn(5, 96)


def test_bad_arguments_are_named() -> None:
    stack, run, batch, stream = packed()
    far, nowhere = torch.tensor([0, 1, 2, 3, 500]), torch.full((5,), -1)
    with pytest.raises(IndexError, match="token 4 has position 500"):
        stack.run(stream, replace(batch, positions=far), run.cache)
    with pytest.raises(IndexError, match="token 0 has position 0 of 192 and slot -1"):
        stack.run(stream, replace(batch, slots=nowhere), run.cache)
    with pytest.raises(RuntimeError, match="the batch's tensors do not fit together"):
        stack.run(stream[:4], batch, run.cache)
    with pytest.raises(RuntimeError, match=r"stream and out must be \[T, 96\]"):
        stack.run(torch.randn(5, 95), batch, run.cache)
    with pytest.raises(RuntimeError, match="the stream is BFloat16, the layers are Float"):
        stack.run(stream.bfloat16(), batch, run.cache)
    with pytest.raises(RuntimeError, match=r"keys and values must be \[3 or more, slots, 2, 24\]"):
        stack.run(stream, batch, KVCache(KVSpec(2, 2, 24, 24), 8, torch.float32, CPU))
