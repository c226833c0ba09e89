"""Memory that a burst of requests has left behind goes back to the system once there is nothing to do.

Python and the C library keep what was freed for the next time. After thousands of requests at once that is more than
all else in the HTTP process, and in a container it counts.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

SECONDS = 5.0  # between two looks
WORTH = 32 * 2**20  # bytes more than what was there the last time: giving back takes some milliseconds

_STATUS = Path("/proc/self/statm")
_PAGE = resource.getpagesize()


class IdleMemory:
    """What this process holds beyond what it held when it last gave back; nothing where the system does not tell."""

    def __init__(self) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        self._trim = trim if _STATUS.exists() else None
        self._floor = resident() if self._trim else 0

    @property
    def is_worth_it(self) -> bool:
        """Whether there may be much to give back."""
        return self._trim is not None and resident() > self._floor + WORTH

    def give_back(self) -> None:
        """Takes milliseconds, in which Python does nothing else, and some more in which it may."""
        gc.collect()
        if self._trim is not None:
            self._trim(0)
            self._floor = resident()


async def give_back_when_idle(idle: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Look again and again, until cancelled."""
    memory = IdleMemory()
    while True:
        await asyncio.sleep(seconds)
        if idle() and memory.is_worth_it:
            await asyncio.to_thread(memory.give_back)


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(_STATUS.read_text().split()[1]) * _PAGE
