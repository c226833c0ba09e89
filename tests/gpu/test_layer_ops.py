"""Triton's layer operations on a CUDA device: the contract's cases in every dtype, and a whole model with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.kernels import triton as triton_kernels
from models.layers.ops import LayerOps, TorchOps, load_ops
from models.loader import load_model
from tests.contract.test_layer_ops import (
    test_gated,
    test_norm_of_heads_in_the_fused_projection,
    test_norms,
    test_rotate_and_store,
)
from tests.paged import PagedRun

__all__ = ["test_gated", "test_norm_of_heads_in_the_fused_projection", "test_norms", "test_rotate_and_store"]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
DEMO = Path(__file__).parents[2] / "demo" / "target"


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """What the cases make, they make on the device."""
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture
def ops() -> LayerOps:
    return load_ops(DEVICE, torch.float32, "triton")


@pytest.fixture(params=triton_kernels.DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def test_auto_takes_them(dtype: torch.dtype) -> None:
    assert type(load_ops(DEVICE, dtype)).__name__ == "TritonOps"


def test_a_token_does_not_depend_on_the_others(ops: LayerOps, dtype: torch.dtype) -> None:
    x, weight, gate_up = torch.randn(33, 200).to(dtype), torch.randn(200).to(dtype), torch.randn(33, 88).to(dtype)
    for row in (0, 13, 32):
        alone = slice(row, row + 1)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5)[alone], ops.rms_norm(x[alone], weight, 1e-5))
        assert torch.equal(ops.gated(gate_up, "silu")[alone], ops.gated(gate_up[alone], "silu"))


def test_the_demo_model_computes_the_same() -> None:
    """Logits of chains in chunks and of a tree, with the kernels and in plain PyTorch, in float32."""
    logits = []
    for attention, ops in (("reference", TorchOps()), ("triton", load_ops(DEVICE, torch.float32, "triton"))):
        model = load_model(DEMO, dtype="float32", device=DEVICE, attention=attention, ops=ops)
        run = PagedRun(model, rows=2, capacity=400)
        tokens = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(1), device="cpu").tolist()
        parts = run.extend([tokens, tokens[:40]], chunk=128)
        logits.append(torch.cat([*parts, run.tree(0, tokens[:6], [-1, 0, 0, 1, 2, 4])]))
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-3, atol=2e-3)
