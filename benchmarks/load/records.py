"""What came of one request."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.load.events import Drafts, Source


@dataclass(frozen=True)
class Record:
    """One request, with times of one clock, in seconds.

    Attributes:
        prompt: its number; records of the same prompt can be compared.
        scheduled: when it was to be sent. All that it waited for since then counts: a server that holds a client up
            must not gain from the client's sending less (coordinated omission).
        sent: when it was sent.
        ended: when its answer, or its failure, was known.
        arrivals: when text came.
        counts: tokens that came at each of ``arrivals``; None: the server does not count them by chunk.
        output_tokens: of the whole answer; None: the server does not say.
        wanted: tokens asked for, at most.
        error: kind of failure: "http 429", "error in stream", "truncated", "timeout", "connection", "malformed"; None:
            none.
        detail: what it said.
        text: the answer, where nothing counts its tokens yet; else empty.
        category: of its prompt, where the file of prompts has such.
    """

    prompt: int
    scheduled: float
    sent: float
    ended: float
    arrivals: tuple[float, ...]
    counts: tuple[int, ...] | None
    source: Source
    output_tokens: int | None
    prompt_tokens: int | None
    wanted: int
    digest: str
    finish_reason: str | None
    drafts: Drafts | None
    error: str | None = None
    detail: str = ""
    text: str = ""
    category: str | None = None

    @property
    def tokens(self) -> int:
        """Of the answer; its chunks where the server does not count."""
        return len(self.arrivals) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float | None:
        """Time to first token, from when the request was to be sent."""
        return self.arrivals[0] - self.scheduled if self.arrivals else None

    @property
    def ttft_sent(self) -> float | None:
        """The same from when it was sent: the server's part."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def latency(self) -> float:
        """To the end of the answer, from when the request was to be sent."""
        return self.ended - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first ones; None where there are no others.

        Over the tokens that came after the first chunk. Where only the whole number is known, the first chunk is taken
        to hold one of them.
        """
        later = sum(self.counts[1:]) if self.counts is not None else self.tokens - 1
        if len(self.arrivals) < 2 or later < 1:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / later

    @property
    def gaps(self) -> list[float]:
        """Times between chunks: the pauses that a reader sees."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def tokens_until(self, moment: float) -> float:
        """Those that came until then."""
        if self.arrivals and self.arrivals[-1] <= moment:
            return self.tokens
        came = sum(1 for arrival in self.arrivals if arrival <= moment)
        if self.counts is not None:
            return sum(self.counts[:came])
        return self.tokens * came / max(1, len(self.arrivals))
