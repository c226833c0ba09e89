"""Finding stop strings in text that comes in pieces."""

from __future__ import annotations

from decoding.errors import RequestError


class StopStrings:
    """Scans text character by character; holds back what may still become a stop string.

    Raises:
        RequestError: for an empty stop string.
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        if "" in stops:
            raise RequestError("A stop string must have at least one character.", param="stop")
        # the longest first: of several that end together, it wins
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, early: bool = False) -> tuple[str, str | None]:
        """(text that is certain, the stop string that was completed or None). After a stop, push no more.

        Args:
            early: a stop string that is completed in this text is text as any other; its last part may begin one.
        """
        if not self._matchers:
            return text, None
        pending = self._held + text
        for place, char in enumerate(text, start=len(self._held)):
            completed = [matcher.stop for matcher in self._matchers if matcher.step(char)]
            if completed and not early:
                end = place + 1
                self._held = ""
                return pending[: end if self._include_stop else end - len(completed[0])], completed[0]
        kept = len(pending) - max(matcher.matched for matcher in self._matchers)
        self._held = pending[kept:]
        return pending[:kept], None

    def flush(self) -> str:
        """The held text, when nothing follows."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth, Morris and Pratt's automaton: amortised O(1) a character, whatever the stop string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # the longest prefix of ``stop`` that the text ends in
        self._borders = _borders(stop)

    def step(self, char: str) -> bool:
        """Take one character; whether it completes the stop string."""
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        if self.stop[self.matched] == char:
            self.matched += 1
        if self.matched < len(self.stop):
            return False
        self.matched = self._borders[-1]
        return True


def _borders(pattern: str) -> list[int]:
    """For every prefix, the length of its longest proper suffix that is also a prefix of the pattern."""
    borders = [0]
    for char in pattern[1:]:
        length = borders[-1]
        while length and pattern[length] != char:
            length = borders[length - 1]
        borders.append(length + 1 if pattern[length] == char else 0)
    return borders
