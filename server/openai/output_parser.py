"""From a choice's text to what it is made of: reasoning first, then text and tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from decoding.request import Reasoning
from decoding.text import Tokenizer
from server.openai.pieces import CallArguments, CallFailed, CallStart, Piece, Text
from server.openai.reasoning import ReasoningFormat, ReasoningSplitter, find_reasoning_format
from server.openai.tools.base import ToolParser
from server.openai.tools.plan import ToolPlan
from server.openai.tools.table import ToolFormat, find_tool_format


class OutputParser:
    """Reads one choice. Without a splitter and a tool parser all is text."""

    def __init__(self, splitter: ReasoningSplitter | None, calls: ToolParser | None, *, parallel: bool = True) -> None:
        self._splitter = splitter
        self._calls = calls
        self._parallel = parallel

    def push(self, text: str) -> list[Piece]:
        """The pieces that ``text`` makes certain."""
        pieces: list[Piece] = [Text(text)] if text else []
        return self._read(pieces if self._splitter is None else self._splitter.push(text))

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """The output ends here, perhaps cut by the limit of tokens: what was held back."""
        pieces = [] if self._splitter is None else self._read(self._splitter.finish())
        return pieces if self._calls is None else pieces + self._told(self._calls.finish(cut=cut))

    @property
    def reasons(self) -> bool:
        """Whether reasoning is told from the answer."""
        return self._splitter is not None

    @property
    def reasoning_end(self) -> int | None:
        """Where the answer begins in the text, in characters; None while that is open."""
        return 0 if self._splitter is None else self._splitter.end

    def _read(self, pieces: list[Piece]) -> list[Piece]:
        calls = self._calls
        if calls is None:
            return pieces
        read: list[Piece] = []
        for piece in pieces:
            read += self._told(calls.push(piece.text)) if isinstance(piece, Text) else [piece]
        return read

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        """Without parallel calls the first one is told and the others are not, as vLLM does it."""
        if self._parallel:
            return pieces
        return [p for p in pieces if not (isinstance(p, CallStart | CallArguments | CallFailed) and p.index)]


@dataclass(frozen=True)
class Reading:
    """How the choices of one request are read.

    Attributes:
        new_parser: makes one choice's parser.
        kept: ids of special tokens that must reach it.
    """

    new_parser: Callable[[], OutputParser]
    kept: frozenset[int]


@dataclass(frozen=True)
class OutputFormats:
    """How the served model writes what is not plain text.

    Attributes:
        special: those of its markers that are special tokens, and their ids. The parsers must see them, and a client
            must not where they mark nothing.
        tags: the tags of reasoning that are one token each, and their ids.
    """

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    special: dict[str, int]
    tags: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_parser: str, reasoning_parser: str) -> OutputFormats:
        """The formats of those names; "auto" looks for signs of them in the model's chat template.

        Raises:
            ConfigError: there is no format of that name.
        """
        tools = find_tool_format(tool_parser, tokenizer.chat_source)
        reasoning = find_reasoning_format(reasoning_parser, tokenizer.chat_source)
        markers = [*(tools.markers if tools else ()), *(reasoning.tags if reasoning else ())]
        special = {marker: token for marker in markers if (token := tokenizer.special_id(marker)) is not None}
        tags = reasoning.tags if reasoning else ()
        spelled = [(tag, tokenizer.encode(tag, add_special_tokens=False)) for tag in tags]
        return cls(tools, reasoning, special, {tag: ids[0] for tag, ids in spelled if len(ids) == 1})

    @property
    def spells_calls(self) -> bool:
        """Whether a grammar of texts can write a call."""
        return self.tools is not None and not any(marker in self.special for marker in self.tools.spelled)

    def template_id(self, call_id: str) -> str:
        """A client's call id as the model's template takes it."""
        return call_id if self.tools is None else self.tools.template_id(call_id)

    def thought_before(self, prompt: str) -> Reasoning | None:
        """What the model may think before it says what a grammar asks for.

        None: nothing. The model knows no tags, or they are more than a token each, or the prompt has closed them.

        Args:
            prompt: the text that the output continues.
        """
        if self.reasoning is None:
            return None
        place = self.reasoning.place_in(prompt)
        opening, close = (self.tags.get(tag) for tag in self.reasoning.tags)
        if close is None or place == "behind" or (place == "before" and opening is None):
            return None
        return Reasoning(close, opening if place == "before" else None)

    def reading(
        self, plan: ToolPlan, prompt: str, *, shows_special: bool = False, constrained: bool = False
    ) -> Reading | None:
        """How a request's choices are read; None: there is nothing but text in them.

        Args:
            prompt: the text that the choices continue.
            shows_special: the client wants special tokens in the text.
            constrained: a grammar holds the output from its first token on, so that there is no reasoning in it.
        """
        tags = None if constrained else self.reasoning
        if tags is None and plan.parser is None:
            return None
        wanted = {*(tags.tags if tags else ()), *(self.tools.markers if self.tools and plan.parser else ())}
        special = {marker: token for marker, token in self.special.items() if marker in wanted}
        hidden = frozenset() if shows_special else frozenset(special)

        def new_parser() -> OutputParser:
            splitter = None if tags is None else ReasoningSplitter(tags, prompt)
            return OutputParser(splitter, plan.new_parser(hidden), parallel=plan.parallel)

        return Reading(new_parser, frozenset(special.values()))
