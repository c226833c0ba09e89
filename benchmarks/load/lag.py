"""Whether the client kept up: how late its event loop was, and how busy its process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np

_BEAT = 0.01  # seconds
BUSY = 0.85  # of a core, from which on the client is what is measured
LATE_MS = 10.0  # of the loop, in one of a hundred beats
LATE_SHARE = 0.1  # of the median time to first token, or between chunks


@dataclass
class Lag:
    """Filled while it is watched.

    Attributes:
        delays: seconds by which the loop was late, at each beat.
        cpu: seconds that the process computed.
        wall: seconds that passed.
    """

    delays: list[float] = field(default_factory=list)
    cpu: float = 0.0
    wall: float = 0.0

    @property
    def busy(self) -> float:
        """Share of a core."""
        return self.cpu / self.wall if self.wall else 0.0

    def percentile_ms(self, share: float) -> float:
        return 1e3 * float(np.percentile(self.delays, share)) if self.delays else 0.0

    def __add__(self, other: Lag) -> Lag:
        return Lag(self.delays + other.delays, self.cpu + other.cpu, self.wall + other.wall)

    def warning(self, times_ms: list[float]) -> str | None:
        """Why the client may have been the bottleneck; None: it was not.

        Args:
            times_ms: the median times that were measured.
        """
        if self.busy > BUSY:
            return f"the client's process was busy for {self.busy:.0%} of the time: times hold its own delays"
        late = self.percentile_ms(99)
        shortest = min(times_ms, default=0.0)
        if late > LATE_MS and late > LATE_SHARE * shortest:
            return (
                f"the client's event loop was up to {late:.0f} ms late (99th percentile): it, or the machine that it "
                "shares with others, was too busy for times as short as these"
            )
        return None


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Lag]:
    """Watch the running loop."""
    lag = Lag()
    cpu, wall = time.process_time(), time.perf_counter()
    beat = asyncio.create_task(_beat(lag))
    try:
        yield lag
    finally:
        beat.cancel()
        lag.cpu, lag.wall = time.process_time() - cpu, time.perf_counter() - wall


async def _beat(lag: Lag) -> None:
    while True:
        due = time.perf_counter() + _BEAT
        await asyncio.sleep(_BEAT)
        lag.delays.append(max(0.0, time.perf_counter() - due))
