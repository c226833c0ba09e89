"""``{"name": ..., "parameters": {...}}`` as the whole output, or behind ``<|python_tag|>``: Llama 3.1 and later."""

from __future__ import annotations

from server.openai.tools.base import Offer, ToolParser
from server.openai.tools.call_json import CallReader

PYTHON_TAG = "<|python_tag|>"


class Llama3JsonParser(ToolParser):
    """An output that is another object, an answer in JSON, say, is text from its first key that calls do not have."""

    markers = (PYTHON_TAG,)

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._separated = False
        self._state = self._expecting

    def _marked(self, marker: str) -> None:
        self._state = self._expecting

    def _called(self) -> None:
        self._separated = False
        self._state = self._between

    def _expecting(self, text: str) -> str:
        """A call may begin here."""
        return self._call(self._skip_space(text))

    def _between(self, text: str) -> str:
        """Behind a call; a semicolon or a comma may separate it from the next one."""
        stripped = self._skip_space(text)
        if stripped.startswith((";", ",")) and not self._separated:
            self._separated = True
            self._raw.append(stripped[0])
            return stripped[1:]
        return self._call(stripped)

    def _call(self, text: str) -> str:
        if text.startswith("{"):
            self._read(CallReader(self._offer.names, other_keys=False))
        elif text:
            self._give_up()
        return text
