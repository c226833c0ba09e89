"""The chunks of a streamed answer as bytes: what is the same in all of them is encoded once.

With a dict and ``json.dumps`` a chunk would cost several times what the rest of the way from the engine to the socket
does.
"""

from __future__ import annotations

from server.openai.generation import Generation
from server.openai.rendering import Head, StreamUsage, usage
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

    def chunk(self, choice: str) -> bytes:
        """The event of one choice, which is given as JSON in ASCII."""
        if self._stream_usage.continuous:
            return self._with_usage(choice)
        return f"{self._begin}{choice}{self._end}".encode("ascii")

    def last(self) -> bytes:
        """The event after those of all choices: it has none, and tells the usage."""
        return self._with_usage("")

    def _with_usage(self, choice: str) -> bytes:
        told = to_json(usage(self._generation))
        return f'{self._begin}{choice}{self._close},"usage":{told}}}\n\n'.encode("ascii")
