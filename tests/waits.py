"""Finds where the host would wait for the device, on CPU tensors: calls that need a tensor's contents or size of data.

with watch() as waits:
    ...
assert waits.reads == 1  # results that were fetched
assert not waits.others  # "decoding/sampling.py:12 item", ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
FETCH = ROOT / "models/transfer.py"
READING = {
    *("item", "tolist", "nonzero", "argwhere", "cpu", "masked_select", "equal", "allclose", "is_nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__array__", "unique", "unique_consecutive"),
}
PLACING = {"to", "tensor", "as_tensor", "cuda"}  # from the host to a device: waits unless the memory is pinned


class Waits(TorchFunctionMode):
    """Records calls that would wait, by file, line and name."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[str] = []
        self._fetches: list[Any] = []  # frames, kept so that each is counted once

    @property
    def reads(self) -> int:
        return len(self._fetches)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "numpy":  # of host tensors, as others have none: arrays on their way, or results
            self._note_fetch()
        elif self._waits(name, args, kwargs or {}):
            self.others.append(f"{_caller()} {name}")
        return func(*args, **(kwargs or {}))

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in READING:
            return True
        if name in PLACING:
            return any(isinstance(each, torch.device) for each in (*args, *kwargs.values()))
        if name == "where":
            return len(args) == 1
        if name == "repeat_interleave":
            return len(args) > 1 and isinstance(args[1], Tensor) and "output_size" not in kwargs
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index)
        return False

    def _note_fetch(self) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None and Path(frame.f_code.co_filename) != FETCH:
            frame = frame.f_back
        # a list comprehension has a frame of its own
        while frame is not None and frame.f_code.co_name == "<listcomp>":
            frame = frame.f_back
        if frame is not None and not any(frame is known for known in self._fetches):
            self._fetches.append(frame)


def _caller() -> str:
    """The innermost of our own lines that is being run."""
    frame: Any = sys._getframe(2)
    while not (path := Path(frame.f_code.co_filename)).is_relative_to(ROOT) or path == Path(__file__):
        frame = frame.f_back
    return f"{path.relative_to(ROOT).as_posix()}:{frame.f_lineno}"


@contextmanager
def watch() -> Iterator[Waits]:
    """Record the waits of the block."""
    with Waits() as waits:
        yield waits
