"""Triton's layer operations in its interpreter: the cases of the contract. tests/unit/test_triton.py runs this file.

float16 stands for the narrow types: the interpreter's bfloat16 is not that of a device.
"""

from __future__ import annotations

import pytest
import torch

from models.layers.ops import LayerOps, load_ops
from tests.contract.test_layer_ops import (
    CPU,
    test_gated,
    test_norm_of_heads_in_the_fused_projection,
    test_norms,
    test_rotate_and_store,
)

__all__ = ["test_gated", "test_norm_of_heads_in_the_fused_projection", "test_norms", "test_rotate_and_store"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ops() -> LayerOps:
    return load_ops(CPU, torch.float32, "triton")


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def test_a_token_does_not_depend_on_the_others(ops: LayerOps, dtype: torch.dtype) -> None:
    x, weight, gate_up = torch.randn(33, 200).to(dtype), torch.randn(200).to(dtype), torch.randn(33, 88).to(dtype)
    for row in (0, 13, 32):
        alone = slice(row, row + 1)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5)[alone], ops.rms_norm(x[alone], weight, 1e-5))
        assert torch.equal(ops.gated(gate_up, "silu")[alone], ops.gated(gate_up[alone], "silu"))


def test_the_sum_may_take_the_residuals_memory_but_no_others(ops: LayerOps) -> None:
    both = torch.randn(6, 32)
    x, residual = both[::2], both[1::2]  # strided views: neighbours lie between their rows
    kept, total = x.clone(), x + residual
    normed, stream = ops.add_rms_norm(x, residual, torch.ones(32), 1e-5)
    assert torch.equal(stream, total)
    assert torch.equal(normed, ops.rms_norm(total, torch.ones(32), 1e-5))
    assert torch.equal(x, kept)


def test_an_unknown_activation(ops: LayerOps) -> None:
    with pytest.raises(KeyError, match="relu"):
        ops.gated(torch.zeros(1, 4), "relu")
