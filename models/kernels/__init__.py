"""The fused CPU kernels: ``torch.ops.saccade``, built from the C++ in this folder (build.py).

``load()`` first; where it returns False, the reference attention and ``TorchOps`` serve.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")

log = logging.getLogger("saccade.kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache  # registering operators is once a process, and so is the warning
def load() -> bool:
    """Make ``torch.ops.saccade`` callable, building it if need be. False, after a warning, where that cannot be."""
    from models.kernels.build import BuildError, build  # not above: it is a program too (python -m)

    try:
        library = build()
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise BuildError(f"{library} cannot be loaded ({error}); delete it and start again") from error
    except BuildError as error:
        log.warning("the CPU kernels are not available, so whatever runs on the CPU is several times slower: %s", error)
        return False
    return True


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels work, on this device and dtype."""
    return device.type == "cpu" and dtype in DTYPES and load()


def required() -> Any:
    """``torch.ops.saccade``, for what cannot do without.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """
    if not load():
        raise RuntimeError("the CPU kernels are not available")
    return torch.ops.saccade


def pick(what: str, table: Mapping[str, Callable[[], T]], name: str, plain: str, fused: bool) -> T:
    """An entry of a table of implementations. "auto" is "cpu" where the kernels serve (``fused``), else ``plain``.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: the implementation was named and does not work here.
    """
    if name == "auto":
        name = "cpu" if fused else plain
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(table)}, auto")
    return table[name]()
