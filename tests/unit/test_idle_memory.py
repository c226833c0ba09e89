"""Memory that is given back to the system when there is nothing to do, and not before."""

from __future__ import annotations

import asyncio
import multiprocessing
import platform

import pytest

from server.idle_memory import WORTH, give_back_when_idle, resident

MIB = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps what was freed")
def test_what_a_burst_left_goes_back_once_nothing_is_to_be_done() -> None:
    # in a process of its own: this one may have room for the burst in what earlier tests have left
    child = multiprocessing.get_context("spawn").Process(target=burst)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode == 0


def burst() -> None:
    """The test; raises what does not hold."""
    asyncio.run(_burst())


async def _burst() -> None:
    idle = False
    giving = asyncio.create_task(give_back_when_idle(lambda: idle, seconds=0.01))
    await asyncio.sleep(0.05)
    before = resident()
    pieces = [bytes(600) for _ in range(200_000)]  # large enough for the C library, small enough to be kept by it
    last = pieces[-1]  # above all of them, so that the heap cannot shrink by itself
    del pieces
    await asyncio.sleep(0.1)
    assert resident() > before + WORTH + 32 * MIB
    idle = True
    async with asyncio.timeout(10):
        while resident() > before + WORTH:
            await asyncio.sleep(0.01)
    giving.cancel()
    await asyncio.gather(giving, return_exceptions=True)
    assert last
