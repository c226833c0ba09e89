"""How weights can be stored. A format is one file and one line in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.layers.int8 import int8_packing
from models.layers.linear import Packing, exact_packing

FORMATS: dict[str, Callable[[torch.device, torch.dtype], Packing | None]] = {
    "none": exact_packing,
    "int8": int8_packing,
}


def packing_of(name: str, device: torch.device, dtype: torch.dtype) -> Packing | None:
    """The argument for ``Linear.pack`` that stores weights in the format called ``name``.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: the format does not work here; the message names the fix.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown quantization {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name](device, dtype)
