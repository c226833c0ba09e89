"""The chunks of a streamed answer as bytes: what is the same in all of them is encoded once.

With a dict and ``json.dumps`` a chunk would cost several times what the rest of the way from the engine to the socket
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.openai.generation import Generation
from server.openai.rendering import Head, StreamUsage, usage, usage_so_far
from server.openai.sse import to_json

_CHOICES = '"choices":['


class Chunks:
    """Makes the chunks of one streamed answer, each of them a whole event.

    Args:
        head: what all chunks begin with.
        kind: their ``object``.
        stream_usage: where usage is told.
        generation: whose usage.
    """

    def __init__(self, head: Head, kind: str, stream_usage: StreamUsage, generation: Generation) -> None:
        # no text in the head can hold this mark: its quotes would be escaped
        before, mark, after = to_json(head.payload(kind, [])).partition(_CHOICES)
        self._begin = f"data: {before}{mark}"
        self._close = after.removesuffix("}")
        null = ',"usage":null' if stream_usage.final else ""
        self._end = f"{self._close}{null}}}\n\n"
        self._stream_usage = stream_usage
        self._generation = generation

    def chunk(self, choice: str, index: int, beside: Mapping[str, Any] | None = None, *, begins: bool = False) -> bytes:
        """The event of one choice.

        Args:
            choice: JSON in ASCII.
            index: of the choice.
            beside: further fields of the chunk.
            begins: it tells nothing of the choice's tokens yet.
        """
        if self._stream_usage.continuous:
            beside = {**(beside or {}), "usage": usage_so_far(self._generation, index, begins=begins)}
        elif beside:
            beside = {**beside, "usage": None} if self._stream_usage.final else beside
        else:
            return f"{self._begin}{choice}{self._end}".encode("ascii")
        return self._with_fields(choice, beside)

    def last(self, beside: Mapping[str, Any]) -> bytes:
        """The event after those of all choices: it has none, and tells the usage if that is wanted.

        Args:
            beside: what else is told of the whole answer.
        """
        told = {"usage": usage(self._generation)} if self._stream_usage.final else {}
        return self._with_fields("", {**told, **beside})

    def _with_fields(self, choice: str, fields: Mapping[str, Any]) -> bytes:
        return f"{self._begin}{choice}{self._close},{to_json(fields)[1:]}\n\n".encode("ascii")
