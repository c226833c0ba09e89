"""What the bodies of all requests take, from their first byte until their prompts are token ids."""

from __future__ import annotations

from server.errors import OverloadedError


class BodyMemory:
    """Counts bytes of bodies; what is parsed from them takes a small multiple of that."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def begin(self) -> HeldBody:
        """The share of a new request."""
        return HeldBody(self)

    def take(self, size: int) -> None:
        """Raises OverloadedError when there is no room for so many bytes more."""
        if self.held + size > self._limit:
            raise OverloadedError(
                "The server is overloaded: too many large requests came at once. Try again later.",
                limit="max_body_memory",
            )
        self.held += size

    def free(self, size: int) -> None:
        self.held -= size


class HeldBody:
    """One request's share."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._size = 0

    def take(self, size: int) -> None:
        """Raises OverloadedError when there is no room for so many bytes more."""
        self._memory.take(size)
        self._size += size

    def free(self) -> None:
        """Give everything back; can be called twice."""
        self._memory.free(self._size)
        self._size = 0
