"""Linear layers: the product itself, and that a row's bits do not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.layers.linear import Linear, packs

CPU = torch.device("cpu")
SHAPES = [(64, 96), (256, 512), (704, 256), (1024, 300), (1088, 128), (2816, 256)]


def layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(inputs)
    linear = Linear(inputs, outputs, bias, CPU, dtype)
    assert linear.weight is not None
    weight = linear.weight.normal_().clone()
    if linear.bias is not None:
        linear.bias.normal_()
    return linear, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_packing_does_not_change_the_product(dtype: torch.dtype, bias: bool) -> None:
    linear, weight = layer(96, 80, dtype, bias)
    linear.pack()
    x = torch.randn(5, 96).to(dtype)
    expected = F.linear(x.double(), weight.double(), linear.bias.double() if linear.bias is not None else None)
    tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=tolerance)
    assert linear(x).dtype == dtype
    assert (linear.weight is None) == packs(CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    if not packs(CPU, dtype):
        pytest.skip("oneDNN does not pack this dtype on this machine")
    linear, _ = layer(inputs, outputs, dtype)
    linear.pack()
    x = torch.randn(200, inputs).to(dtype)
    with torch.inference_mode():
        alone = torch.cat([linear(x[row : row + 1]) for row in range(64)])
        for rows in (*range(2, 65), 100, 200):
            assert torch.equal(linear(x[:rows])[:64], alone[:rows]), f"{rows} rows"
