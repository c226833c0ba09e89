"""Reading a tool call's JSON as it comes: one step a character, so that no output costs more than its length.

Models write JSON loosely: with raw line breaks in strings, with keys in any order, with arguments in a string. What can
be understood is; anything else is refused at the first character that shows it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto
from typing import Any

import pydantic_core

MAX_NAME_CHARS = 512  # of keys and names as written: a missing quote must not swallow the rest of the output

_SPACE = " \t\r\n"
_BARE = frozenset('{}[]:,"+-.0123456789eEtruefalsn' + _SPACE)  # all that JSON has outside of strings
_ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "function")
_KNOWN_KEYS = frozenset({*_NAMES, *_ARGUMENTS, "type", "id"})


class Status(Enum):
    MORE = auto()
    DONE = auto()  # with this character
    PAST = auto()  # before this character, which is not part of it
    BROKEN = auto()  # at this character, which is not part of it


class ValueText:
    """The text of one JSON value on its way. Control characters in strings, which JSON does not allow, are escaped."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._spelled: list[str] = []
        self._told = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def step(self, char: str) -> Status:
        """Take one character; the value must not begin with a space."""
        if self._limit is not None and len(self._spelled) >= self._limit:
            return Status.BROKEN
        if self._in_string:
            return self._string_step(char)
        if char not in _BARE:
            return Status.BROKEN
        if self._depth == 0 and char not in '{["':
            return self._scalar_step(char)
        self._spelled.append(char)
        self._in_string = char == '"'
        self._depth += (char in "{[") - (char in "}]")
        return Status.MORE if self._depth or self._in_string else Status.DONE

    def take(self) -> str:
        """The text since the last take."""
        fragment = "".join(self._spelled[self._told :])
        self._told = len(self._spelled)
        return fragment

    def decoded(self) -> Any:
        """The value.

        Raises:
            ValueError: it is no JSON.
        """
        return pydantic_core.from_json("".join(self._spelled), allow_inf_nan=False)

    def _string_step(self, char: str) -> Status:
        self._spelled.append(json.dumps(char)[1:-1] if char < " " else char)
        if self._escaped or char == "\\":
            self._escaped = not self._escaped
        elif char == '"':
            self._in_string = False
            return Status.MORE if self._depth else Status.DONE
        return Status.MORE

    def _scalar_step(self, char: str) -> Status:
        if char in _SPACE or char in ",:}]":
            return Status.PAST if self._spelled else Status.BROKEN
        self._spelled.append(char)
        return Status.MORE


class CallReader:
    """Reads one call: a JSON object with a name and, mostly, arguments.

    Args:
        names: of the functions that may be called; with any other this is no call.
        other_keys: keys that calls do not have are passed over; else they show that this is no call.

    Attributes:
        name: of the function, once it is known.
        begun: the name is known, and the arguments have begun or there will be none.
    """

    def __init__(self, names: Collection[str], *, other_keys: bool = True) -> None:
        self._names = names
        self._other_keys = other_keys
        self._place = "object"  # what is expected next
        self._value: ValueText | None = None  # what is being read
        self._key = ""
        self._arguments: ValueText | None = None  # told as they come
        self._fixed: str | None = None  # told at once
        self.name: str | None = None
        self.begun = False
        self.unread = ""

    def step(self, char: str) -> Status:
        """Take one character. BROKEN at the last brace: the arguments are no JSON."""
        if self._value is None:
            return Status.MORE if char in _SPACE else self._expect(char)
        status = self._value.step(char)
        if status is Status.DONE or status is Status.PAST:
            value, self._value = self._value, None
            if not self._accept(value):
                return Status.BROKEN
            return self.step(char) if status is Status.PAST else Status.MORE
        return status

    def take(self) -> str:
        """The arguments' text since the last take; nothing before the call has begun."""
        if not self.begun:
            return ""
        if self._arguments is not None:
            return self._arguments.take()
        fragment, self._fixed = self._fixed or "", ""
        return fragment

    def _expect(self, char: str) -> Status:
        if self._place == "value" or (self._place == "key" and char == '"'):
            return self._begin_value(char)
        if char == "}" and self._place in ("key", "after"):
            return self._finish()
        after = {("object", "{"): "key", ("colon", ":"): "value", ("after", ","): "key"}.get((self._place, char))
        self._place = after or self._place
        return Status.BROKEN if after is None else Status.MORE

    def _begin_value(self, char: str) -> Status:
        short = self._place == "key" or self._key in _NAMES
        self._value = ValueText(MAX_NAME_CHARS if short else None)
        if self._place == "value" and self._key in _ARGUMENTS and char == "{" and not self._has_arguments:
            self._arguments = self._value
            self._update()
        return self._value.step(char)

    def _accept(self, value: ValueText) -> bool:
        """Use a value that is complete; whether this may still be a call."""
        try:
            content = None if self._is_skipped else value.decoded()
        except ValueError:
            return False
        if self._place == "key":
            self._key, self._place = str(content), "colon"
            return self._other_keys or self._key in _KNOWN_KEYS
        self._place = "after"
        if self._key in _NAMES and self.name is None:
            return self._accept_name(content)
        return self._key not in _ARGUMENTS or self._accept_arguments(value, content)

    def _accept_name(self, content: object) -> bool:
        if isinstance(content, str) and content in self._names:
            self.name = content
            self._update()
            return True
        return False

    def _accept_arguments(self, value: ValueText, content: object) -> bool:
        if value is self._arguments:
            return isinstance(content, dict)
        if self._has_arguments:
            return False
        self._fixed = "{}" if content is None else _object_in(content)
        self._update()
        return self._fixed is not None

    def _finish(self) -> Status:
        if self.name is None:
            return Status.BROKEN
        if not self._has_arguments:
            self._fixed = "{}"
        self._update()
        return Status.DONE

    def _update(self) -> None:
        self.begun = self.name is not None and self._has_arguments

    @property
    def _has_arguments(self) -> bool:
        return self._arguments is not None or self._fixed is not None

    @property
    def _is_skipped(self) -> bool:
        return self._place == "value" and self._key not in (*_NAMES, *_ARGUMENTS)


class NamedArguments:
    """Reads the arguments of a call whose function was named before them; has the same interface as ``CallReader``."""

    def __init__(self, name: str) -> None:
        self._value = ValueText()
        self.name: str | None = name
        self.begun = True
        self.unread = ""

    def step(self, char: str) -> Status:
        """Take one character; the first must be the object's brace."""
        status = self._value.step(char)
        if status is not Status.DONE:
            return status
        try:
            return Status.DONE if isinstance(self._value.decoded(), dict) else Status.BROKEN
        except ValueError:
            return Status.BROKEN

    def take(self) -> str:
        """The arguments' text since the last take."""
        return self._value.take()


def _object_in(content: object) -> str | None:
    """Arguments that came as a string: the string's content if it is an object."""
    if not isinstance(content, str):
        return None
    try:
        return content if isinstance(pydantic_core.from_json(content, allow_inf_nan=False), dict) else None
    except ValueError:
        return None
