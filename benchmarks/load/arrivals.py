"""When requests come in an open loop, whatever becomes of those before them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from benchmarks.load.settings import Load


def arrival_times(load: Load, rng: np.random.Generator) -> Iterator[float]:
    """Seconds from the start at which requests come, without end, never falling.

    poisson: gaps are gamma-distributed with mean 1 / rate and shape ``burstiness``, exponential at 1. constant: all
    gaps are equal. burst: ``burst_size`` requests at once, and a gap that keeps the rate.
    """
    now = 0.0
    rate = load.rate or math.inf
    if load.arrival == "poisson" and rate < math.inf:
        while True:
            now += float(rng.gamma(load.burstiness, 1.0 / (rate * load.burstiness)))
            yield now
    together = load.burst_size if load.arrival == "burst" else 1
    number = 0
    while True:
        yield number // together * together / rate
        number += 1
