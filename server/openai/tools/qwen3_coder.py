"""``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``: Qwen3-Coder and later Qwens,
Nemotron 3, Step 3.5; and with another outer tag Seed-OSS.

Values are bare text, and the tool's schema says how to take it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pydantic_core

from server.openai.tools.base import Offer, ToolParser
from server.openai.tools.call_json import MAX_NAME_CHARS, Status

OPEN, CLOSE = "<tool_call>", "</tool_call>"
SEED_OPEN, SEED_CLOSE = "<seed:tool_call>", "</seed:tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

_ENDS = (PARAMETER_END, "\n" + PARAMETER_END)  # a line break next to a tag is not part of the value
_PYTHONS = {"True": "true", "False": "false", "None": "null"}


class Qwen3CoderParser(ToolParser):
    """Each call stands in tags of its own. Outer tags that do not come are not missed."""

    markers = (OPEN, FUNCTION)
    close = CLOSE

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._tail = ""  # the beginning of a tag

    def _marked(self, marker: str) -> None:
        self._tail = ""
        if marker == FUNCTION:
            self._read(TaggedReader(self._offer.schemas))
        else:
            self._state = self._opened

    def _called(self) -> None:
        self._tail = ""
        self._state = self._closing

    def _opened(self, text: str) -> str:
        rest, found = self._tag(text, FUNCTION)
        if found:
            self._read(TaggedReader(self._offer.schemas))
        return rest

    def _closing(self, text: str) -> str:
        rest, found = self._tag(text, self.close)
        if found:
            self._clear()
            self._state = self._in_text
        return rest

    def _tag(self, text: str, tag: str) -> tuple[str, bool]:
        """White space and a tag: (the rest, whether the tag has come); gives up where something else comes."""
        pending = self._tail + text if self._tail else self._skip_space(text)
        if len(pending) < len(tag) and tag.startswith(pending):
            self._tail = pending
            return "", False
        self._tail = ""
        if pending.startswith(tag):
            self._raw.append(tag)
            return pending[len(tag) :], True
        self._give_up()
        return pending, False

    def _end(self) -> None:
        if self._state == self._closing:
            self._clear()  # white space, or half of the closing tag
        else:
            self._raw.append(self._tail)
        super()._end()


class SeedOssParser(Qwen3CoderParser):
    """The same in other outer tags."""

    markers = (SEED_OPEN, FUNCTION)
    close = SEED_CLOSE


class TaggedReader:
    """Reads one call behind ``<function=``, up to its end tag. Arguments are told as JSON, strings as they come.

    Args:
        schemas: of the parameters of each function that may be called.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._step: Callable[[str], Status] = self._in_name
        self._word: list[str] = []
        self._tag = ""
        self._keys: set[str] = set()
        self._value = _TaggedValue(text=True)
        self._untold: list[str] = []
        self.name: str | None = None
        self.begun = False
        self.unread = ""

    def step(self, char: str) -> Status:
        """Take one character."""
        return self._step(char)

    def take(self) -> str:
        """The arguments' text since the last take."""
        told = "".join(self._untold)
        self._untold.clear()
        return told

    def _in_name(self, char: str) -> Status:
        if char != ">":
            return self._spell(char)
        name = self._spelled()
        if name not in self._schemas:
            return Status.BROKEN
        self.name, self.begun = name, True
        self._untold.append("{")
        self._step = self._between
        return Status.MORE

    def _between(self, char: str) -> Status:
        """A parameter or the function's end must come."""
        if not self._tag and char.isspace():
            return Status.MORE
        self._tag += char
        if self._tag == FUNCTION_END:
            self._untold.append("}")
            return Status.DONE
        if self._tag == PARAMETER:
            self._tag = ""
            self._step = self._in_key
            return Status.MORE
        if any(tag.startswith(self._tag) for tag in (PARAMETER, FUNCTION_END)):
            return Status.MORE
        self.unread = self._tag[:-1]  # perhaps of another call's tag
        return Status.BROKEN

    def _in_key(self, char: str) -> Status:
        if char != ">":
            return self._spell(char)
        key = self._spelled()
        if key in self._keys:
            return Status.BROKEN
        self._untold.append(f"{', ' if self._keys else ''}{json.dumps(key)}: ")
        self._keys.add(key)
        assert self.name is not None
        self._value = _TaggedValue(text=_is_text(self._schemas[self.name], key))
        self._step = self._in_value
        return Status.MORE

    def _in_value(self, char: str) -> Status:
        told, ended = self._value.step(char)
        self._untold.append(told)
        if ended:
            self._step = self._between
        return Status.MORE

    def _spell(self, char: str) -> Status:
        self._word.append(char)
        return Status.BROKEN if len(self._word) > MAX_NAME_CHARS or char in "<\n" else Status.MORE

    def _spelled(self) -> str:
        word = "".join(self._word).strip()
        self._word.clear()
        return word


class _TaggedValue:
    """One value, up to its end tag. Text is told as it comes; else what is JSON is JSON, and the rest is text."""

    def __init__(self, *, text: bool) -> None:
        self._text = text
        self._first = True
        self._held = ""  # the beginning of an end
        self._collected: list[str] = []

    def step(self, char: str) -> tuple[str, bool]:
        """(JSON that is certain, whether the value has ended)."""
        told = '"' if self._first and self._text else ""
        skipped = self._first and char == "\n"
        self._first = False
        if skipped:
            return told, False
        self._held += char
        while not any(end.startswith(self._held) for end in _ENDS):
            told += self._tell(self._held[0])
            self._held = self._held[1:]
        return (told + self._finish(), True) if self._held in _ENDS else (told, False)

    def _tell(self, char: str) -> str:
        if self._text:
            return json.dumps(char, ensure_ascii=False)[1:-1]
        self._collected.append(char)
        return ""

    def _finish(self) -> str:
        if self._text:
            return '"'
        text = "".join(self._collected).strip()
        try:
            value = pydantic_core.from_json(_PYTHONS.get(text, text), allow_inf_nan=False)
        except ValueError:
            value = text
        return json.dumps(value, ensure_ascii=False)


def _is_text(schema: Mapping[str, Any], key: str) -> bool:
    """Whether a parameter can only be a string, so that what looks like JSON is none."""
    properties = schema.get("properties")
    parameter = properties.get(key) if isinstance(properties, dict) else None
    return isinstance(parameter, dict) and parameter.get("type") in ("string", ["string"])
