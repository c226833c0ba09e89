"""Memory that a burst of requests has left behind goes back to the system once there is nothing to do.

Python and the C library keep what was freed for the next time. After thousands of requests at once that is more than
all else in this process, and in a container it counts.
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


async def give_back_when_idle(idle: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Look again and again, until cancelled; does nothing where the system does not tell what is resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is None or not _STATUS.exists():
        return
    floor = resident()
    while True:
        await asyncio.sleep(seconds)
        if idle() and resident() > floor + WORTH:
            gc.collect()
            await asyncio.to_thread(trim, 0)
            floor = resident()


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(_STATUS.read_text().split()[1]) * _PAGE
