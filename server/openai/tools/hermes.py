"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5, Qwen3 and many after them."""

from __future__ import annotations

from server.openai.tools.base import Offer, ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """Several calls stand in tags of their own. A closing tag that does not come is not missed."""

    markers = (OPEN,)

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._tail = ""  # the beginning of a closing tag

    def _marked(self, marker: str) -> None:
        self._read()

    def _called(self) -> None:
        self._tail = ""
        self._state = self._closing

    def _closing(self, text: str) -> str:
        pending = self._tail + text
        if not self._tail:
            pending = text.lstrip()
            self._say(text[: len(text) - len(pending)])
        if len(pending) < len(CLOSE) and CLOSE.startswith(pending):
            self._tail = pending
            return ""
        self._state = self._in_text
        return pending.removeprefix(CLOSE)
