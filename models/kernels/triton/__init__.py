"""Kernels for CUDA in Triton. ``serves`` first; where it is False, the reference attention and ``TorchOps`` serve.

Importing this package imports nothing of Triton.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess

import torch

log = logging.getLogger("saccade.kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a device, a compiler or a Triton that does not work raises, beside Triton's own errors
FAILURES = (ImportError, OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels work, on this device and dtype; where they should and do not, after one warning.

    The first call compiles and runs some of them.
    """
    return device.type == "cuda" and dtype in DTYPES and not _failure_logged(_with_index(device), dtype)


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Return if the kernels work.

    Raises:
        RuntimeError: they do not; why.
    """
    if dtype not in DTYPES:
        raise RuntimeError(f"the Triton kernels know float32, bfloat16 and float16, not {dtype}")
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(f"the Triton kernels need a CUDA device, not {device}")
    reason = failure(_with_index(device), dtype)
    if reason:
        raise RuntimeError(f"the Triton kernels do not work on {device}: {reason}")


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU, as tests do. It is so if the environment says so at import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def shared_memory(device: torch.device) -> int:
    """Shared memory that one program may have on a CUDA device, bytes."""
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(_with_index(device).index)
    return int(properties["max_shared_mem"])


@functools.cache
def failure(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels do not work on this device and dtype; empty if they do."""
    try:
        from triton.errors import TritonError
    except ImportError as error:
        return f"{error}; install the package triton"
    from models.kernels.triton.probe import probe

    try:
        probe(device, dtype)
    except (TritonError, *FAILURES) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache  # one warning, for attention and layer operations together
def _failure_logged(device: torch.device, dtype: torch.dtype) -> bool:
    reason = failure(device, dtype)
    if reason:
        log.warning(
            "the Triton kernels do not work on %s in %s, so attention and layers run in plain PyTorch, which is slower "
            "and takes memory for whole matrices of scores. The reason: %s",
            device,
            dtype,
            reason,
        )
    return bool(reason)


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
