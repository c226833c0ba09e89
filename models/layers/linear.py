"""A linear layer without autograd: weights packed once for oneDNN where that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many inputs oneDNN sums one row in the same order as many; beyond it, only from two rows on.
_SAME_ORDER_INPUTS = 1024


class Linear:
    """x [T, I] -> x W^T + b [T, O]. Fill ``weight`` and ``bias`` first, then ``pack``.

    A packed layer gives every row the same bits whatever the number of rows, in float32 and bfloat16: the text of a
    request does not depend on its neighbours. (F.linear does not hold that in float32. It saves about 10 us at one row
    of a small float32 layer and is slower from there on, so there is one way, not two.)
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.weight: Tensor | None = torch.empty(outputs, inputs, device=device, dtype=dtype)  # None once packed
        self.bias = torch.empty(outputs, device=device, dtype=dtype) if bias else None
        self._packed: Tensor | None = None
        self._packed_linear: Callable[..., Any] | None = None
        self._pad_one_row = inputs > _SAME_ORDER_INPUTS

    def pack(self) -> None:
        """Reorder the weight for oneDNN where the device and dtype allow; the plain one is given up."""
        if self.weight is None or not packs(self.weight.device, self.weight.dtype):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self._packed_linear = torch.ops.mkldnn._linear_pointwise.default
        self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed_linear is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        if self._pad_one_row and x.shape[0] == 1:
            padded: Tensor = self._packed_linear(x.repeat(2, 1), self._packed, self.bias, "none", [], "")
            return padded[:1]
        result: Tensor = self._packed_linear(x, self._packed, self.bias, "none", [], "")
        return result


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``Linear.pack`` packs weights of this dtype on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
