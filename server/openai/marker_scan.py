"""Finding markers in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class MarkerScan:
    """Splits text at the first marker in it; holds back an end that may become one.

    A push costs O(its length) for each marker; what is held back is shorter than a marker.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = tuple(markers)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """(text before the marker, the marker or None, the rest behind it); the rest has not been looked at."""
        pending = self._held + text
        found = [(place, marker) for marker in self._markers if (place := pending.find(marker)) >= 0]
        if found:
            # of two that begin together, the longer one
            place, marker = min(found, key=lambda each: (each[0], -len(each[1])))
            self._held = ""
            return pending[:place], marker, pending[place + len(marker) :]
        kept = len(pending) - max((prefix_at_end(pending, marker) for marker in self._markers), default=0)
        self._held = pending[kept:]
        return pending[:kept], None, ""

    def flush(self) -> str:
        """The held text, when nothing follows."""
        held, self._held = self._held, ""
        return held


def prefix_at_end(text: str, marker: str) -> int:
    """The length of the longest end of ``text`` that a marker begins with, and that is not all of it."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
