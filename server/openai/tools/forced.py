"""Outputs that a grammar holds to calls: with ``tool_choice`` "required", or a function's name."""

from __future__ import annotations

from server.openai.tools.base import Offer, ToolParser
from server.openai.tools.call_json import NamedArguments
from server.openai.tools.lists import ListParser


class ForcedCallsParser(ListParser):
    """The output is a list of calls, or one."""

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._state = self._list_or_call

    def _marked(self, marker: str) -> None:
        raise AssertionError(f"{marker} marks nothing in this form")


class ForcedArgumentsParser(ToolParser):
    """The output is one call's arguments; the offer has one name, its function's."""

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._state = self._expecting

    def _marked(self, marker: str) -> None:
        raise AssertionError(f"{marker} marks nothing in this form")

    def _called(self) -> None:
        self._state = self._in_text

    def _expecting(self, text: str) -> str:
        stripped = self._skip_space(text)
        if stripped.startswith("{"):
            (name,) = self._offer.names
            self._read(NamedArguments(name))
        elif stripped:
            self._give_up()
        return stripped
