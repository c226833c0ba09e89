"""Every set of layer operations against TorchOps in float64, rounded: the arithmetic inside is at least float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layers.ops import ACTIVATIONS, OPS, LayerOps, TorchOps, load_ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
EXACT = TorchOps()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(set(OPS) - {"triton"}))  # tests/unit/test_triton.py runs that one's cases
def ops(request: pytest.FixtureRequest) -> LayerOps:
    return load_ops(CPU, torch.float32, request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def assert_rounded(actual: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """``actual`` has the dtype and is ``exact`` up to that many roundings and float32's error inside."""
    step = torch.finfo(dtype).eps
    assert actual.dtype == dtype
    inside = 1e-13 if dtype == torch.float64 else 5e-6  # 1 + erf(x) cancels for negative x
    torch.testing.assert_close(actual.double(), exact.double(), rtol=roundings * step + inside, atol=inside + step / 8)


@pytest.mark.parametrize("width", [1, 15, 16, 40, 256, 1000])
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_norms(ops: LayerOps, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((tokens, width), (tokens, width), (width,)))
    assert_rounded(ops.rms_norm(x, weight, 1e-5), EXACT.rms_norm(x.double(), weight.double(), 1e-5), dtype, 2)
    total = x + residual
    normed, stream = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert torch.equal(stream, total)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))


def test_norm_of_heads_in_the_fused_projection(ops: LayerOps, dtype: torch.dtype) -> None:
    fused, weight = torch.randn(7, 6, 32).to(dtype), torch.randn(32).to(dtype)
    for part in torch.split(fused, [3, 1, 2], 1):
        normed = ops.rms_norm(part, weight, 1e-6)
        assert normed.shape == part.shape
        assert torch.equal(normed, ops.rms_norm(part.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("width", [1, 17, 704])
def test_gated(ops: LayerOps, dtype: torch.dtype, activation: str, width: int) -> None:
    gate_up = (torch.randn(9, 2 * width) * 4).to(dtype)
    gate_up[0, 0], gate_up[1, 0] = 100.0, -100.0
    assert_rounded(ops.gated(gate_up, activation), EXACT.gated(gate_up.double(), activation), dtype, 2)


@pytest.mark.parametrize(("dim", "rotated", "value_dim"), [(64, 64, 64), (64, 16, 48), (40, 40, 24), (80, 32, 80)])
def test_rotate_and_store(ops: LayerOps, dtype: torch.dtype, dim: int, rotated: int, value_dim: int) -> None:
    tokens, heads, kv_heads = 11, 4, 2
    wide = torch.promote_types(dtype, torch.float32)
    fused = torch.randn(tokens, heads + kv_heads, dim).to(dtype)
    query, key = torch.split(fused, [heads, kv_heads], 1)
    value = torch.randn(tokens, kv_heads, value_dim).to(dtype)
    angles = torch.randn(100, rotated // 2, dtype=torch.float64)
    rope = torch.stack([angles.cos(), angles.sin()], 1).to(wide)
    positions, slots = torch.randperm(100)[:tokens], torch.randperm(64)[:tokens]

    def caches(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.full((64, kv_heads, dim), 7, dtype=kind), torch.full((64, kv_heads, value_dim), 7, dtype=kind)

    keys, values = caches(dtype)
    turned = ops.rotate_and_store(query, key, value, rope, positions, slots, keys, values)
    exact_keys, exact_values = caches(torch.float64)
    inputs = (query.double(), key.double(), value.double(), rope.double(), positions, slots, exact_keys, exact_values)
    assert_rounded(turned, EXACT.rotate_and_store(*inputs), dtype)
    assert_rounded(keys, exact_keys, dtype)
    assert torch.equal(values.double(), exact_values)


def test_a_token_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    ops = load_ops(CPU, dtype, "cpu")
    x, weight, gate_up = torch.randn(33, 200).to(dtype), torch.randn(200).to(dtype), torch.randn(33, 88).to(dtype)
    for row in (0, 13, 32):
        alone = slice(row, row + 1)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5)[alone], ops.rms_norm(x[alone], weight, 1e-5))
        assert torch.equal(ops.gated(gate_up, "silu")[alone], ops.gated(gate_up[alone], "silu"))


def test_cpu_ops_refuse_what_does_not_fit() -> None:
    ops = load_ops(CPU, torch.float32, "cpu")
    x, cache, index = torch.randn(1, 2, 16), torch.zeros(16, 2, 16), torch.tensor([0])
    rope = torch.zeros(8, 2, 8)
    with pytest.raises(IndexError, match="slot 16 of 16"):
        ops.rotate_and_store(x, x, x, rope, index, torch.tensor([16]), cache, cache)
    with pytest.raises(IndexError, match="position 8 of 8"):
        ops.rotate_and_store(x, x, x, rope, torch.tensor([8]), index, cache, cache)
    with pytest.raises(RuntimeError, match=r"weight must be \[16\]"):
        ops.rms_norm(x, torch.ones(15), 1e-5)
    with pytest.raises(KeyError, match="relu"):
        ops.gated(torch.zeros(1, 4), "relu")


def test_auto_takes_the_fused_operations() -> None:
    assert type(load_ops(CPU, torch.bfloat16)).__name__ == "CpuOps"
    with pytest.raises(ValueError, match="there are: torch, cpu, triton, auto"):
        load_ops(CPU, torch.float32, "fast")
