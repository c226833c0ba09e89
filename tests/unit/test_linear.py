"""Linear layers: the product itself, and that a row's bits do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.layers.linear import Linear, OneDnnProduct, PackedProduct, Packing, exact_packing

CPU = torch.device("cpu")
PACKED_DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 96), (256, 512), (704, 256), (1024, 300), (1088, 128), (2816, 256)]
ODD_SHAPES = [(1, 1), (1, 64), (3, 63), (31, 65), (33, 127), (129, 193), (513, 17)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def packed(request: pytest.FixtureRequest) -> Packing:
    """A packing that works here, or a skipped test."""
    if request.param is PackedProduct:
        assert kernels.load(), "the kernels must work where tests run"
    elif not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    return request.param  # type: ignore[no-any-return]


both_packings = pytest.mark.parametrize("packed", [PackedProduct, OneDnnProduct], indirect=True)


def layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> tuple[Linear, Tensor]:
    linear = Linear(inputs, outputs, bias, CPU, dtype)
    assert linear.weight is not None
    weight = linear.weight.normal_().clone()
    if linear.bias is not None:
        linear.bias.normal_()
    return linear, weight


def close_to_float64(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs())  # what a sum's rounding is relative to
    rounding = torch.finfo(result.dtype).eps * expected.abs() + 32 * torch.finfo(torch.float32).eps * size
    assert bool(((result.double() - expected).abs() <= rounding).all())


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
    assert (linear.weight is None) == (exact_packing(CPU, dtype) is not None)


def test_another_packing_takes_the_place_of_the_default() -> None:
    linear, weight = layer(8, 4, torch.float32)
    linear.pack(lambda given, bias: lambda x: F.linear(x, 2 * given, bias))
    x = torch.randn(3, 8)
    assert torch.equal(linear(x), F.linear(x, 2 * weight, linear.bias))
    linear.pack()  # packed is packed
    assert torch.equal(linear(x), F.linear(x, 2 * weight, linear.bias))


@both_packings
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(
    packed: Packing, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    linear, _ = layer(inputs, outputs, dtype)
    linear.pack(packed)
    x = torch.randn(200, inputs).to(dtype)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(70)])
    for rows in (*range(2, 71), 96, 97, 200):
        assert torch.equal(linear(x[:rows])[:70], alone[:rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [*SHAPES, *ODD_SHAPES])
def test_every_output_is_the_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    for rows in (0, 1, 5, 6, 7, 13, 98):
        x = torch.randn(rows, inputs).to(dtype)
        close_to_float64(PackedProduct(weight, None)(x), x, weight, None)
        close_to_float64(PackedProduct(weight, bias)(x), x, weight, bias)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_rows_need_not_lie_together(dtype: torch.dtype) -> None:
    product = PackedProduct(torch.randn(70, 33).to(dtype), None)
    wide = torch.randn(40, 80).to(dtype)
    assert torch.equal(product(wide[::2, 7:40]), product(wide[::2, 7:40].contiguous()))
    assert torch.equal(product(wide[:, ::2][:, :33]), product(wide[:, ::2][:, :33].contiguous()))


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 4096), (1025, 2050)])
def test_threads_do_not_change_a_bit(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    product = PackedProduct(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype))
    x = torch.randn(17, inputs).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(product(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_numbers_that_are_not_finite_stay_in_their_row_and_output() -> None:
    weight, x = torch.randn(130, 64), torch.randn(9, 64)
    x[4, 3], weight[70, 5] = torch.nan, torch.inf
    out = PackedProduct(weight, None)(x)
    wrong = ~out.isfinite()
    assert wrong[4].all()
    assert wrong[:, 70].all()
    assert int(wrong.sum()) == 130 + 9 - 1


def test_bad_arguments_are_named() -> None:
    ops = kernels.required()
    packed = ops.pack_linear(torch.randn(70, 33))
    with pytest.raises(RuntimeError, match=r"this weight is not \[70, 32\]"):
        ops.packed_linear(torch.randn(2, 32), packed, None, 70)
    with pytest.raises(RuntimeError, match="the weight Float"):
        ops.packed_linear(torch.randn(2, 33).bfloat16(), packed, None, 70)
    with pytest.raises(RuntimeError, match=r"bias must be \[70\]"):
        ops.packed_linear(torch.randn(2, 33), packed, torch.randn(69), 70)
    with pytest.raises(RuntimeError, match="no packed format for"):
        ops.pack_linear(torch.randn(4, 4).half())
