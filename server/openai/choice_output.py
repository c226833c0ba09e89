"""One choice of a response: from the engine's tokens to text, logprobs and a finish reason that may be sent."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from decoding.messages import SpeculationStats, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from decoding.text import TextStream, Tokenizer
from server.errors import GenerationError


@dataclass(frozen=True)
class OutputOptions:
    """How the engine's tokens become the answer."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    prompt_only: bool = False  # the engine's one token is not wanted
    kept: frozenset[int] = frozenset()  # special tokens that are not skipped


@dataclass(frozen=True)
class ScoredToken:
    """A returned token with its logprobs."""

    token_id: int
    logprob: float | None  # None for the first token of a prompt
    top: tuple[tuple[int, float], ...]
    offset: int  # where its text begins in the choice's text


@dataclass(frozen=True)
class Delta:
    """What a choice gained."""

    index: int
    text: str = ""
    scored: tuple[ScoredToken, ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def empty(self) -> bool:
        return not self.text and not self.scored and self.finish_reason is None


def concatenated(deltas: Sequence[Delta]) -> Delta:
    """All of one choice's deltas (at least one) as one."""
    scored = [delta.scored for delta in deltas if delta.scored is not None]
    return Delta(
        deltas[-1].index,
        "".join(delta.text for delta in deltas),
        tuple(token for each in scored for token in each) if scored else None,
        deltas[-1].finish_reason,
    )


class ChoiceOutput:
    """The state of one choice.

    A stop string ends it at the token that completes the string: later tokens are neither returned nor counted. A stop
    token (end of sequence included) is counted and scored, as vLLM does, and its text is not returned.

    Attributes:
        returned: tokens returned so far, as ``usage.completion_tokens`` counts them.
        generated: tokens that the engine made, those after a stop string included.
        finished: the last delta was returned.
        speculation: the engine's account; with its terminal event.
        cached_tokens: prompt tokens that came from the prefix cache; with its first event.
        reasoning_tokens: returned tokens before the answer, closing tag included; None: nobody tells the two apart.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, request: GenerateRequest, options: OutputOptions) -> None:
        self._index = index
        self._options = options
        self._text = TextStream(
            tokenizer,
            request.prompt_ids,
            options.stop,
            options.skip_special_tokens,
            options.include_stop,
            options.kept,
        )
        self._scored = request.params.logprobs is not None
        self._chars = 0
        self._base = 0  # characters of the echoed prompt
        self.returned = 0
        self.generated = 0
        self.finished = False
        self.speculation: SpeculationStats | None = None
        self.cached_tokens = 0
        self.reasoning_tokens: int | None = None

    def tokens_before(self, place: int | None) -> int:
        """Returned tokens whose text begins before that place of the output, in characters; None: all."""
        return self.returned if place is None else min(bisect_left(self._text.offsets, place), self.returned)

    def echo(self, text: str, scored: tuple[ScoredToken, ...] | None) -> Delta:
        """The prompt as the beginning of the answer; must come before the first ``take``."""
        self._base = len(text)
        return Delta(self._index, text, scored)

    def take(self, event: TokenEvent) -> Delta:
        """What an event adds to the answer.

        Raises:
            GenerationError: the engine gave up on the request.
        """
        self.generated += len(event.token_ids)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self.speculation = event.speculation or self.speculation
        if self.finished:
            return Delta(self._index)
        if event.finish_reason == "error":
            raise GenerationError(event.error or "The engine could not finish this request.")
        if event.finish_reason == "cancelled":
            raise GenerationError("The engine cancelled this request.")
        if self._options.prompt_only:
            self.finished = True
            return Delta(self._index, finish_reason="length")
        return self._extend(event)

    def _extend(self, event: TokenEvent) -> Delta:
        ids = event.token_ids
        silent = bool(ids) and event.stop_token == ids[-1] and not self._options.include_stop
        pushed = self._text.push(ids[:-1] if silent else ids)
        text, reason, count = pushed.text, event.finish_reason, len(ids)
        if pushed.stopped:
            reason, count = "stop", pushed.token_count - self.returned
        elif reason is not None:
            text += self._text.finish().text
        self._chars += len(text)
        scored = self._score(event.logprobs, count) if self._scored else None
        self.returned += count
        self.finished = reason is not None
        return Delta(self._index, text, scored, "length" if reason == "length" else "stop" if reason else None)

    def _score(self, logprobs: tuple[TokenLogprobs, ...] | None, count: int) -> tuple[ScoredToken, ...]:
        offsets = self._text.offsets[self.returned : self.returned + count]
        offsets += [self._chars] * (count - len(offsets))  # a stop token's text would begin at the end
        return tuple(
            ScoredToken(entry.token_id, entry.logprob, entry.top, self._base + offset)
            for entry, offset in zip((logprobs or ())[:count], offsets, strict=True)
        )


def score_prompt(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
) -> tuple[ScoredToken, ...]:
    """The prompt's tokens with their logprobs; nothing stands before the first, so that it has none."""
    text = TextStream(tokenizer)
    text.push(prompt_ids)
    return tuple(
        ScoredToken(token, entry.logprob if entry else None, entry.top if entry else (), offset)
        for token, entry, offset in zip(prompt_ids, logprobs, text.offsets, strict=True)
    )
