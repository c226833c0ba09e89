"""At what pace choices end, as a guess when there will be room again."""

from __future__ import annotations

from collections.abc import Callable

LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
_KEPT = 0.9  # of the mean at each choice that ends: about the last ten count


class Pace:
    """A moving mean of the time between two ends while there is a queue: idle time says nothing about the pace."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None  # when a choice ended, and others waited
        self._interval: float | None = None

    def ended(self, choices: int, *, busy: bool) -> None:
        """Some choices ended just now; ``busy``: others waited for a place until now."""
        now, before = self._clock(), self._last
        self._last = now if busy else None
        if not busy or before is None:
            return
        each = (now - before) / choices
        self._interval = each if self._interval is None else _KEPT * self._interval + (1 - _KEPT) * each

    def seconds_for(self, choices: float) -> float:
        """A guess of the time in which so many choices end, within reasonable bounds."""
        return min(max(choices * (self._interval or 0.0), LEAST_SECONDS), MOST_SECONDS)
