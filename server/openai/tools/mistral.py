"""``[TOOL_CALLS]`` in its forms: a list of objects (7B v0.3, Nemo, Small 3.0), and since v11 of Mistral's tokenizer a
name and its arguments for each call, ``[TOOL_CALLS]name[ARGS]{...}`` or ``[TOOL_CALLS]name{...}``.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string

from server.openai.tools.base import Offer
from server.openai.tools.call_json import NamedArguments
from server.openai.tools.lists import ListParser

MARKER, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

_ID = re.compile(r"[A-Za-z0-9]{9}")
_MAX_HEADER_CHARS = 512  # name, [CALL_ID] with an id, [ARGS]


class MistralParser(ListParser):
    """The ids that models write come behind the name, with which an id must be told, so that they are not used."""

    markers = (MARKER,)

    def __init__(self, offer: Offer) -> None:
        super().__init__(offer)
        self._header = ""

    def _marked(self, marker: str) -> None:
        self._state = self._form

    def _form(self, text: str) -> str:
        """What stands behind the marker tells which form it is."""
        stripped = self._skip_space(text)
        if stripped.startswith(("[", "{")):
            return self._list_or_call(stripped)
        if stripped:
            self._listed, self._header = False, ""
            self._state = self._in_header
        return stripped

    def _in_header(self, text: str) -> str:
        before, brace, _ = text.partition("{")
        self._header += before
        self._raw.append(before)
        name = self._header.partition(ARGS)[0].partition(CALL_ID)[0].strip()
        if brace and name in self._offer.names:
            self._read(NamedArguments(name))
        elif brace or len(self._header) > _MAX_HEADER_CHARS:
            self._give_up()
        return text[len(before) :]


def new_id() -> str:
    """An id as Mistral's templates demand it: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def template_id(call_id: str) -> str:
    """A client's id as the template takes it; the same for a call and its result."""
    return call_id if _ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]
