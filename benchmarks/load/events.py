"""What a stream says, event by event, noted with the time at which each piece of it came.

Only ``\\n`` ends a line: JSON may hold what other readers of lines take for an end (U+2028, U+0085). An event is
decoded once, into the few fields that are needed; all else in it is skipped.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

# where the number of tokens of each chunk comes from
Source = Literal["usage of each chunk", "token_ids", "timings", "usage of the last chunk", "tokenizer", "chunks"]

_DATA = b"data:"
_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of the same
    tool_calls: list[Any] | None = None

    def text(self) -> str:
        calls = "".join(str(call) for call in self.tool_calls or ())
        return (self.reasoning_content or self.reasoning or "") + (self.content or "") + calls


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Speculation(msgspec.Struct):
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    by_drafter: dict[str, dict[str, int]] = {}


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    speculation: _Speculation | None = None


class _Timings(msgspec.Struct):
    """llama.cpp's account of a request, so far."""

    predicted_n: int | None = None
    draft_n: int | None = None
    draft_n_accepted: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class Drafts(msgspec.Struct, frozen=True):
    """A request's account of speculation, where its server gives one."""

    drafted: int
    accepted: int
    steps: int | None  # None: it does not say
    by_drafter: dict[str, dict[str, int]] = {}


class StreamReader:
    """Reads one stream of an answer with one choice.

    Attributes:
        arrivals: the times at which text came, or tokens where the server counts them. What came in one piece came at
            one time.
        counts: the tokens that came at each of them; means nothing while ``source`` is "chunks".
        finish_reason: why the answer ended.
    """

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.counts: list[int] = []
        self.finish_reason: str | None = None
        self._error: str | None = None
        self._malformed: str | None = None
        self._done = False
        self._rest = b""
        self._pieces: list[str] = []
        self._source: Source | None = None
        self._seen = 0
        self._usage: _Usage | None = None
        self._timings: _Timings | None = None

    def feed(self, piece: bytes, now: float) -> None:
        """Read on: ``piece`` came at ``now`` (seconds)."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._event(line[len(_DATA) :].strip(), now)

    @property
    def failure(self) -> tuple[str, str] | None:
        """(kind, what was said) of a stream that came to its end, however well its status looked; None: all is well.

        Only ``[DONE]`` ends a stream: one that just stops was cut somewhere on its way.
        """
        if self._error is not None:
            return "error in stream", self._error
        if self._malformed is not None:
            return "malformed", self._malformed
        return None if self._done else ("truncated", "the stream ended without [DONE]")

    @property
    def source(self) -> Source:
        """Where the counts come from."""
        if self._source in (None, "chunks"):
            return "chunks" if self._total() is None else "usage of the last chunk"
        return self._source

    @property
    def output_tokens(self) -> int | None:
        """Of the whole answer; None: the server does not say."""
        counted = None if self._source in (None, "chunks") else self._seen
        return self._total() if self._total() is not None else counted

    @property
    def prompt_tokens(self) -> int | None:
        return None if self._usage is None else self._usage.prompt_tokens

    @property
    def text(self) -> str:
        """All of it; reasoning and calls of tools as well."""
        return "".join(self._pieces)

    @property
    def digest(self) -> str:
        """Of the text, to compare texts by."""
        return hashlib.sha256(self.text.encode(errors="replace")).hexdigest()[:16]

    @property
    def drafts(self) -> Drafts | None:
        if self._usage is not None and (ours := self._usage.speculation) is not None:
            return Drafts(ours.drafted, ours.accepted, ours.steps, ours.by_drafter)
        if self._timings is not None and self._timings.draft_n is not None:
            return Drafts(self._timings.draft_n, self._timings.draft_n_accepted or 0, None)
        return None

    def _event(self, data: bytes, now: float) -> None:
        if data.startswith(_DONE):
            self._done = True
            return
        try:
            event = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):  # an error's parent is its class for wrong types
            self._malformed = self._malformed or data[:200].decode(errors="replace")
            return
        if event.error:
            self._error = self._error or _message(event.error)
        self._usage = event.usage or self._usage
        self._timings = event.timings or self._timings
        if event.choices:
            self._answer(event, event.choices[0], now)

    def _answer(self, event: _Event, choice: _Choice, now: float) -> None:
        text = choice.delta.text() if choice.delta is not None else choice.text or ""
        self.finish_reason = choice.finish_reason or self.finish_reason
        if text:
            self._pieces.append(text)
            self._source = self._source or _source(event, choice)
        count = self._new_tokens(event, choice)
        if not text and not count:
            return
        if self.arrivals and self.arrivals[-1] == now:
            self.counts[-1] += count
        else:
            self.arrivals.append(now)
            self.counts.append(count)

    def _new_tokens(self, event: _Event, choice: _Choice) -> int:
        """That the event brings; 0 while it is not known how they are counted."""
        if self._source == "token_ids":
            self._seen += (count := len(choice.token_ids or ()))
            return count
        total: int | None = None
        if self._source == "usage of each chunk" and event.usage is not None:
            total = event.usage.completion_tokens
        elif self._source == "timings" and event.timings is not None:
            total = event.timings.predicted_n
        count = 0 if total is None else max(0, total - self._seen)
        self._seen += count
        return count

    def _total(self) -> int | None:
        """By the last word of the server."""
        if self._usage is not None and self._usage.completion_tokens is not None:
            return self._usage.completion_tokens
        return None if self._timings is None else self._timings.predicted_n


_DECODER = msgspec.json.Decoder(_Event)


def _source(event: _Event, choice: _Choice) -> Source:
    """How a server counts that sent this event as the first one with text."""
    if event.usage is not None and event.usage.completion_tokens:
        return "usage of each chunk"
    if choice.token_ids:
        return "token_ids"
    if event.timings is not None and event.timings.predicted_n:
        return "timings"
    return "chunks"


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or error)[:300]
