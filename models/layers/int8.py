"""Weights of eight bits: symmetric, one scale for each output. Activations stay as they are.

torchao chooses the scales and rounds. On a CPU the product is ours (models/kernels/int8_linear.cpp): torchao's own
makes the whole weight wide again for every product, and PyTorch's kernel for it, fast for one row, is slower than
bfloat16 from four rows on, which is where trees begin. Elsewhere torchao's tensor is multiplied as it is.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.layers.linear import Packing

_LIMIT = 127  # without -128: sign and magnitude then fit eight bits, which the kernel makes use of


def int8_packing(device: torch.device, dtype: torch.dtype) -> Packing:
    """The format for ``Linear.pack``.

    Raises:
        RuntimeError: torchao is not installed, or on a CPU the kernels are not available; the message names the fix.
    """
    try:
        _import_torchao()
    except ImportError as error:
        raise RuntimeError("--quantization int8 needs torchao; pip install 'saccade[quant]'") from error
    if device.type != "cpu":
        return TorchaoProduct
    if not kernels.serves(device, dtype):
        raise RuntimeError(
            "--quantization int8 needs the CPU kernels, and they are not available (the log says why); install a C++ "
            "compiler, or leave --quantization out"
        )
    return Int8Product


def _import_torchao() -> None:
    """Without its warnings: of libraries for GPUs that do not load where there is none, and that nothing here uses."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.quantization  # noqa: F401
    finally:
        logging.disable(before)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] -> int8 [O, I], -127 to 127, and scale [O, 1] float32: weight is about int8 * scale."""
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    block = [1, weight.shape[1]]
    wide = weight.float()  # torchao computes scales in the weight's dtype
    scale, zero = choose_qparams_affine(
        wide, MappingType.SYMMETRIC, block, torch.int8, -_LIMIT, _LIMIT, torch.finfo(torch.float32).eps, keepdim=True
    )
    return quantize_affine(wide, block, scale, zero, torch.int8, -_LIMIT, _LIMIT), scale


class Int8Product:
    """A ``Product`` by our CPU kernel. A row has the same bits for any number of rows and threads."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        values, scale = quantize(weight)
        ops = torch.ops.saccade
        self._linear = ops.int8_linear.default
        self._packed = ops.int8_pack(values, weight.dtype)
        self._scale = scale.flatten()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._linear(x, self._packed, self._scale, self._bias)
        return result

    def parts(self) -> dict[str, Tensor]:
        """What it is made of, by the names that layer_stack.h knows."""
        named = {"weight": self._packed, "scale": self._scale}
        return named | ({} if self._bias is None else {"bias": self._bias})


class TorchaoProduct:
    """A ``Product`` by torchao's tensor, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from torchao.quantization import Int8Tensor

        values, scale = quantize(weight)
        self._weight = Int8Tensor(
            values, scale, [1, weight.shape[1]], weight.dtype, zero_point=torch.zeros_like(scale, dtype=torch.int8)
        )
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)
