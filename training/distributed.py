"""One process a device, as torchrun starts them; all by torch.distributed. Alone, there is nothing to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

PATIENCE = timedelta(hours=12)  # the others wait while the main process writes its own training text


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def main_first() -> Iterator[None]:
    """What the main process makes in this block, the others find made."""
    if world_size() > 1 and not is_main():
        distributed.barrier()
    yield
    if world_size() > 1 and is_main():
        distributed.barrier()


def settle() -> None:
    """Wait for all processes, so that nobody's communication is under way any more; before ``stop``.

    The thread of gloo that carried out the last operation lets go of its tensor afterwards, for which it needs the
    interpreter's lock. Destroying the group joins that thread with the lock held, and would wait for ever.
    """
    if world_size() > 1:
        distributed.barrier()


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def largest(value: float, device: torch.device) -> float:
    """The largest of all processes' values, so that they decide alike."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return float(shared)
