"""A linear layer without autograd: its weight is packed once, in a format that is fast to multiply by."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels

Product = Callable[[Tensor], Tensor]  # x [T, I] -> x W^T + b [T, O]
Packing = Callable[[Tensor, Tensor | None], Product]  # weight [O, I] and bias [O] -> the product with them

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
# Up to this many inputs oneDNN sums one row in the same order as many; beyond it, only from two rows on.
_SAME_ORDER_INPUTS = 1024


class Linear:
    """x [T, I] -> x W^T + b [T, O]. Fill ``weight`` and ``bias`` first, then ``pack``.

    A packed layer gives every row the same bits whatever the number of rows, in float32 and bfloat16: the text of a
    request does not depend on its neighbours. (F.linear does not hold that in float32.)
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.weight: Tensor | None = torch.empty(outputs, inputs, device=device, dtype=dtype)  # None once packed
        self.bias = torch.empty(outputs, device=device, dtype=dtype) if bias else None
        self.product: Product | None = None  # once packed

    def pack(self, packing: Packing | None = None) -> None:
        """Turn the weight into a product; the plain weight is given up.

        Args:
            packing: a format; default: the fastest that keeps the weight's values and serves its device and dtype. If
                there is none, the layer stays as it is.
        """
        if self.weight is None:
            return
        packing = packing or exact_packing(self.weight.device, self.weight.dtype)
        if packing is None:
            return
        self.product = packing(self.weight, self.bias)
        self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(x)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)


def exact_packing(device: torch.device, dtype: torch.dtype) -> Packing | None:
    """The format that ``Linear.pack`` takes by default; None where weights stay plain."""
    if dtype not in _PACKED_DTYPES:
        return None
    if kernels.serves(device, dtype):
        return PackedProduct
    return OneDnnProduct if _onednn_packs(device, dtype) else None


class PackedProduct:
    """A ``Product`` by our kernel (models/kernels/linear.cpp), for any number of rows.

    It is made for few rows, yet there is no second copy of the weight in oneDNN's order for many: oneDNN gains little
    there, and its sums differ from ours in the last bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops = kernels.required()
        self._packed: Tensor = ops.pack_linear(weight)
        self._bias = bias
        self._outputs = weight.shape[0]
        self._linear = ops.packed_linear.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._packed, self._bias, self._outputs)  # type: ignore[no-any-return]

    def parts(self) -> dict[str, Tensor]:
        """What it is made of, by the names that layer_stack.h knows."""
        return {"weight": self._packed} | ({} if self._bias is None else {"bias": self._bias})


class OneDnnProduct:
    """A ``Product`` by oneDNN, on a weight in oneDNN's order: for machines without a compiler."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._bias = bias
        self._pad_one_row = weight.shape[1] > _SAME_ORDER_INPUTS

    def __call__(self, x: Tensor) -> Tensor:
        if self._pad_one_row and x.shape[0] == 1:
            padded: Tensor = self._linear(x.repeat(2, 1), self._packed, self._bias, "none", [], "")
            return padded[:1]
        result: Tensor = self._linear(x, self._packed, self._bias, "none", [], "")
        return result


def _onednn_packs(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
