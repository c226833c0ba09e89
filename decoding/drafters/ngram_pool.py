"""The n-grams that one text has shown, by their first token (Lookahead decoding, 2402.02057, section 3.2)."""

from __future__ import annotations

import numpy as np

Tail = tuple[int, ...]  # the tokens of an n-gram after its first

MAX_KEYS = 1024  # first tokens that are remembered beside those of the given text
OCCURRENCES = 64  # of a first token in the given text that are looked at, the last ones


class NgramPool:
    """The most recent n-grams of each first token. Of n-grams, as of first tokens, the least recently used make room.

    The n-grams of the given text are found when their first token is first asked for.

    Args:
        text: [P] int64 tokens, kept and not copied.
        level: N, tokens of an n-gram.
        size: n-grams of a first token at the most.
    """

    def __init__(self, text: np.ndarray, level: int, size: int) -> None:
        self._text = text
        self._level = level
        self._size = size
        self._tails: dict[int, dict[Tail, None]] = {}  # in the order of their last use, as are the tails of each
        self._order: np.ndarray | None = None  # [P - N + 1] int32, places in the text by the token there

    def __len__(self) -> int:
        """N-grams that are held in memory."""
        return sum(map(len, self._tails.values()))

    def add(self, first: int, tail: Tail) -> None:
        """Remember an n-gram: ``first`` and the ``level`` - 1 tokens after it."""
        tails = self._of(first)
        tails.pop(tail, None)
        tails[tail] = None
        if len(tails) > self._size:
            del tails[next(iter(tails))]

    def find(self, first: int) -> list[Tail]:
        """What has followed a token, the most recent first."""
        return list(reversed(self._of(first)))

    def _of(self, first: int) -> dict[Tail, None]:
        tails = self._tails.pop(first, None)
        if tails is None:
            tails = dict.fromkeys(self._in_text(first))
            if len(self._tails) == MAX_KEYS:
                del self._tails[next(iter(self._tails))]
        self._tails[first] = tails
        return tails

    def _in_text(self, first: int) -> list[Tail]:
        """The last different n-grams of the given text that begin with a token, the latest at the end."""
        starts = self._text[: max(0, len(self._text) - self._level + 1)]
        if self._order is None:
            self._order = np.argsort(starts, kind="stable").astype(np.int32)
        low, high = (int(np.searchsorted(starts, first, side, sorter=self._order)) for side in ("left", "right"))
        found: dict[Tail, None] = {}
        for place in self._order[max(low, high - OCCURRENCES) : high][::-1].tolist():
            found.setdefault(tuple(self._text[place + 1 : place + self._level].tolist()))
            if len(found) == self._size:
                break
        return list(reversed(found))
