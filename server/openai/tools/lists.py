"""Calls as a JSON list of objects."""

from __future__ import annotations

from server.openai.tools.base import Offer, ToolParser


class ListParser(ToolParser):
    """A parser whose format has lists: states for them."""

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._listed = False  # the present call stands in a list

    def _called(self) -> None:
        self._state = self._next_in_list if self._listed else self._in_text

    def _list_or_call(self, text: str) -> str:
        """A list's bracket or a call's brace must come."""
        stripped = self._skip_space(text)
        if stripped.startswith("["):
            self._listed = True
            self._raw.append("[")
            self._state = self._in_list
            return stripped[1:]
        self._listed = False
        return self._call(stripped)

    def _in_list(self, text: str) -> str:
        return self._call(self._skip_space(text))

    def _next_in_list(self, text: str) -> str:
        """Behind an object: a comma and the next one, or the list's end."""
        stripped = self._skip_space(text)
        if stripped.startswith(","):
            self._raw.append(",")
            self._state = self._in_list
            return stripped[1:]
        if stripped.startswith("]"):
            self._clear()
            self._state = self._in_text
            return stripped[1:]
        if stripped:
            self._give_up()
        return stripped

    def _call(self, text: str) -> str:
        if text.startswith("{"):
            self._read()
        elif text:
            self._give_up()
        return text

    def _end(self) -> None:
        if self._state == self._next_in_list:
            self._raw = []  # only the list's end is missing
        super()._end()
