"""What a model's output is made of once it has been read: text, reasoning and tool calls, in the order they came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; its arguments follow."""

    index: int  # calls of one output are numbered from 0
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A fragment of a call's arguments, which are a JSON object in text."""

    index: int
    fragment: str


@dataclass(frozen=True)
class CallFailed:
    """A call that had begun turned out to be none: its arguments break off, or are no JSON."""

    index: int
    text: str  # all of it, as the model wrote it


Piece = Text | Reasoning | CallStart | CallArguments | CallFailed


def settled(pieces: Iterable[Piece]) -> list[Piece]:
    """A complete output without its failed calls: their text takes their place."""
    given = list(pieces)
    failed = {piece.index for piece in given if isinstance(piece, CallFailed)}
    kept: list[Piece] = []
    for piece in given:
        if isinstance(piece, CallFailed):
            kept.append(Text(piece.text))
        elif not (isinstance(piece, CallStart | CallArguments) and piece.index in failed):
            kept.append(piece)
    return kept
