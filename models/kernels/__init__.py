"""The fused CPU kernels: ``torch.ops.saccade``, built from the C++ in this folder (build.py).

``load()`` first; where it returns False, the reference attention and ``TorchOps`` serve.
"""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger("saccade.kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache  # registering operators is once a process, and so is the warning
def load() -> bool:
    """Make ``torch.ops.saccade`` callable, building it if need be. False, after a warning, where that cannot be."""
    from models.kernels.build import BuildError, build  # not above: it is a program too (python -m)

    try:
        torch.ops.load_library(str(build()))  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        log.warning(
            "the CPU kernels are not available, so attention and sampling on the CPU will be several times slower; "
            "install a C++ compiler (g++ 10 or newer) and start again. The reason: %s",
            error,
        )
        return False
    return True


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels work, on this device and dtype."""
    return device.type == "cpu" and dtype in DTYPES and load()
