"""What one choice gains, as the deltas of chat tell it: text alone, or text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from server.openai.choice_output import ChoiceOutput, Delta, ScoredToken
from server.openai.output_parser import OutputParser
from server.openai.pieces import CallArguments, CallFailed, CallStart, Piece, Reasoning, Text, settled


@dataclass(frozen=True)
class ChatDelta:
    """What one chunk tells of a choice.

    Attributes:
        content: text of the answer; None: the chunk has none.
        fields: the delta's other fields, in JSON's types.
    """

    content: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    scored: tuple[ScoredToken, ...] | None = None
    finish_reason: str | None = None


class ChoiceDeltas(Protocol):
    """Makes one choice's output into the deltas of chat."""

    def push(self, delta: Delta) -> list[ChatDelta]:
        """The deltas that what was gained makes certain, in order; the last one of all has the finish reason."""
        ...


class ContentDeltas:
    """An output that is text and nothing else."""

    def push(self, delta: Delta) -> list[ChatDelta]:
        deltas = []
        if delta.text or delta.scored:
            deltas.append(ChatDelta(delta.text, scored=delta.scored))
        if delta.finish_reason is not None:
            deltas.append(ChatDelta(finish_reason=delta.finish_reason))
        return deltas


class ParsedDeltas:
    """Makes one choice's output into the deltas of chat, as its parser reads it.

    Logprobs of tokens go out with the next delta, be it what it may: a token of a tag has no delta of its own.
    """

    def __init__(self, parser: OutputParser, output: ChoiceOutput) -> None:
        self._parser = parser
        self._output = output
        self._scored: list[ScoredToken] = []  # not told yet
        self._called = False

    def push(self, delta: Delta) -> list[ChatDelta]:
        """The deltas that what was gained makes certain, in order; the last one of all has the finish reason."""
        pieces = read(self._parser, self._output, delta)
        self._called = self._called or any(isinstance(piece, CallStart) for piece in pieces)
        deltas = [_delta(piece) for piece in pieces if not isinstance(piece, CallFailed)]
        if delta.finish_reason is not None:
            deltas.append(ChatDelta(finish_reason=finish_reason(self._output, delta, called=self._called)))
        self._scored += delta.scored or ()
        if deltas and self._scored:
            deltas[0] = replace(deltas[0], scored=tuple(self._scored))
            self._scored = []
        return deltas


def read(parser: OutputParser, output: ChoiceOutput, delta: Delta) -> list[Piece]:
    """What a parser makes of what the choice gained; it counts the reasoning's tokens."""
    pieces = parser.push(delta.text)
    if delta.finish_reason is not None:
        pieces += parser.finish(cut=delta.finish_reason == "length")
    if parser.reasons:
        output.reasoning_tokens = output.tokens_before(parser.reasoning_end)
    return pieces


def finish_reason(output: ChoiceOutput, delta: Delta, *, called: bool) -> str | None:
    """A choice that ends by itself after calls ends for them; the choice keeps it, for those who count."""
    if called and delta.finish_reason == "stop":
        output.finish_reason = "tool_calls"
        return "tool_calls"
    return delta.finish_reason


def message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """A complete choice's message; calls that failed are text."""
    kept = settled(pieces)
    content = "".join(piece.text for piece in kept if isinstance(piece, Text))
    reasoning = "".join(piece.text for piece in kept if isinstance(piece, Reasoning))
    calls = _calls(kept)
    told: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        told |= _reasoning(reasoning)
    if calls:
        told["tool_calls"] = calls
    return told


def _calls(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, CallArguments):
            arguments.setdefault(piece.index, []).append(piece.fragment)
    return [
        _call(piece.id, piece.name, "".join(arguments.get(piece.index, ())))
        for piece in pieces
        if isinstance(piece, CallStart)
    ]


def _delta(piece: Text | Reasoning | CallStart | CallArguments) -> ChatDelta:
    if isinstance(piece, Text):
        return ChatDelta(piece.text)
    if isinstance(piece, Reasoning):
        return ChatDelta(fields=_reasoning(piece.text))
    if isinstance(piece, CallStart):
        call = {"index": piece.index, **_call(piece.id, piece.name, "")}
    else:
        call = {"index": piece.index, "function": {"arguments": piece.fragment}}
    return ChatDelta(fields={"tool_calls": [call]})


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _reasoning(text: str) -> dict[str, Any]:
    """Under both names that clients look for: DeepSeek's, and vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text}
