"""Telling a model's reasoning from its answer: text between tags that it was trained to think in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decoding.errors import ConfigError, nearest
from server.openai.marker_scan import MarkerScan
from server.openai.pieces import Piece, Reasoning, Text

_MAX_HEAD_CHARS = 256  # white space that may stand before the opening tag


@dataclass(frozen=True)
class ReasoningFormat:
    """The tags of a family of models.

    Attributes:
        begins_inside: the output is reasoning up to the closing tag even if the opening one is nowhere.
    """

    open: str
    close: str
    begins_inside: bool = False

    @property
    def tags(self) -> tuple[str, str]:
        return self.open, self.close

    def place_in(self, prompt: str) -> Literal["before", "inside", "behind"]:
        """Where an output begins that continues this text: templates open the tags, or close them."""
        tail = prompt[-_MAX_HEAD_CHARS:].rstrip()
        if tail.endswith(self.close):
            return "behind"
        return "inside" if self.begins_inside or tail.endswith(self.open) else "before"


REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", begins_inside=True),
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "glm45": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
}
_BY_TEMPLATE = ("mistral", "seed_oss", "qwen3")  # one for each pair of tags


def find_reasoning_format(name: str, template: str) -> ReasoningFormat | None:
    """The format of that name (vLLM's); "auto": the one whose tags the chat template has, None without any.

    Raises:
        ConfigError: there is no format of that name.
    """
    if name == "auto":
        known = (REASONING_FORMATS[each] for each in _BY_TEMPLATE)
        return next((each for each in known if each.open in template or each.close in template), None)
    if name == "none":
        return None
    if name not in REASONING_FORMATS:
        known_names = ["auto", "none", *REASONING_FORMATS]
        raise ConfigError(f"no format of reasoning is called {name!r}: {nearest(name, known_names)}")
    return REASONING_FORMATS[name]


class ReasoningSplitter:
    """Splits one output as it comes. Line breaks next to the tags belong to neither part.

    Args:
        prompt: its end tells whether the model thinks already, or has thought.

    Attributes:
        end: where the answer begins in the output, in characters, the closing tag passed; None while that is open.
    """

    def __init__(self, tags: ReasoningFormat, prompt: str) -> None:
        place = tags.place_in(prompt)
        self._open = tags.open
        self._begins_inside = place == "inside"
        self._scan = MarkerScan((tags.close,))
        self._state = self._answer if place == "behind" else self._undecided
        self._head = ""
        self._chars = 0
        self._fresh = False  # at the beginning of a part: line breaks are dropped
        self._breaks = 0  # line breaks at the end of the reasoning so far
        self.end: int | None = 0 if place == "behind" else None

    def push(self, text: str) -> list[Piece]:
        """The pieces that ``text`` makes certain."""
        self._chars += len(text)
        return self._state(text)

    def finish(self) -> list[Piece]:
        """The output ends here: what was held back."""
        pieces = self._decide() if self._state == self._undecided else []
        if self._state == self._thought:
            pieces += self._reasoning(self._scan.flush())
        return pieces

    def _undecided(self, text: str) -> list[Piece]:
        self._head += text
        stripped = self._head.lstrip()
        may_open = len(stripped) < len(self._open) and self._open.startswith(stripped)
        return [] if may_open and len(self._head) - len(stripped) <= _MAX_HEAD_CHARS else self._decide()

    def _decide(self) -> list[Piece]:
        head, self._head = self._head, ""
        stripped = head.lstrip()
        opened = stripped.startswith(self._open) and len(head) - len(stripped) <= _MAX_HEAD_CHARS
        if opened or self._begins_inside:
            self._state, self._fresh = self._thought, True
            return self._thought(stripped.removeprefix(self._open) if opened else head)
        self._state, self.end = self._answer, 0
        return self._answer(head)

    def _thought(self, text: str) -> list[Piece]:
        before, marker, rest = self._scan.push(text)
        pieces = self._reasoning(before)
        if marker is not None:
            self.end = self._chars - len(rest)
            self._state, self._fresh = self._answer, True
            pieces += self._answer(rest)
        return pieces

    def _reasoning(self, text: str) -> list[Piece]:
        text = self._without_first_breaks(text)
        kept = text.rstrip("\n")
        breaks = len(text) - len(kept)
        if not kept:
            self._breaks += breaks
            return []
        said = "\n" * self._breaks + kept
        self._breaks = breaks
        return [Reasoning(said)]

    def _answer(self, text: str) -> list[Piece]:
        text = self._without_first_breaks(text)
        return [Text(text)] if text else []

    def _without_first_breaks(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text
