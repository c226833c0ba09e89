"""One choice of a response: from the engine's tokens to text, logprobs and a finish reason that may be sent."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from decoding.errors import RequestError
from decoding.messages import SpeculationStats, StepTrace, TokenEvent, TokenLogprobs
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
    scored: bool = True  # logprobs are told, where the engine was asked for them
    token_ids: bool = False  # told beside the text
    prompt_logprobs: int | None = None  # told of the prompt: how many alternatives a token
    held_by: str | None = None  # the field that says what the output must be, for errors about it
    best: int | None = None  # of each prompt's choices so many are returned, by their mean logprob; None: all


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
    token_ids: tuple[int, ...] | None = None  # when they are told
    prompt_ids: tuple[int, ...] | None = None  # with them, in a choice's first delta

    @property
    def weight(self) -> int:
        """What it takes to keep it, in tokens; text alone is little."""
        return 1 + sum(1 + len(token.top) for token in self.scored or ())

    @property
    def empty(self) -> bool:
        return not self.text and not self.scored and not self.token_ids and self.finish_reason is None


def concatenated(deltas: Sequence[Delta]) -> Delta:
    """All of one choice's deltas (at least one) as one."""
    scored = [delta.scored for delta in deltas if delta.scored is not None]
    token_ids = [delta.token_ids for delta in deltas if delta.token_ids is not None]
    return Delta(
        deltas[-1].index,
        "".join(delta.text for delta in deltas),
        tuple(token for each in scored for token in each) if scored else None,
        deltas[-1].finish_reason,
        tuple(token for each in token_ids for token in each) if token_ids else None,
        next((delta.prompt_ids for delta in deltas if delta.prompt_ids is not None), None),
    )


class ChoiceOutput:
    """The state of one choice.

    A stop string ends it at the token that completes the string: later tokens are neither returned nor counted. A stop
    token (end of sequence included) is counted and scored, as vLLM does, and its text is not returned.

    Attributes:
        returned: tokens returned so far, as ``usage.completion_tokens`` counts them.
        generated: tokens that the engine made, those after a stop string included.
        finished: the last delta was returned.
        finish_reason: why it ended, as answers tell it (whoever reads calls in it says so); None: it did not, or was
            given up.
        speculation: the engine's account; with its terminal event.
        cached_tokens: prompt tokens that came from the prefix cache; with its first event.
        reasoning_tokens: returned tokens before the answer, closing tag included; None: nobody tells the two apart.
        trace: of its first steps, when asked for.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, request: GenerateRequest, options: OutputOptions) -> None:
        self.index = index
        self._options = options
        self._text = TextStream(
            tokenizer,
            request.prompt_ids,
            options.stop,
            options.skip_special_tokens,
            options.include_stop,
            options.kept,
            request.params.min_tokens,
        )
        self._prompt_ids = request.prompt_ids if options.token_ids else None  # to be told
        self._scored = request.params.logprobs is not None
        self._logprob_sum = 0.0
        self._chars = 0
        self._base = 0  # characters of the echoed prompt
        self.returned = 0
        self.generated = 0
        self.finished = False
        self.finish_reason: Literal["stop", "length", "tool_calls"] | None = None
        self.speculation: SpeculationStats | None = None
        self.cached_tokens = 0
        self.reasoning_tokens: int | None = None
        self.trace: list[StepTrace] = []

    def tokens_before(self, place: int | None) -> int:
        """Returned tokens whose text begins before that place of the output, in characters; None: all."""
        return self.returned if place is None else min(bisect_left(self._text.offsets, place), self.returned)

    @property
    def mean_logprob(self) -> float:
        """Of the tokens returned, by which choices are ranked; the engine must have been asked for logprobs."""
        return self._logprob_sum / self.returned if self.returned else -math.inf

    def echo(self, text: str, scored: tuple[ScoredToken, ...] | None) -> Delta:
        """The prompt as the beginning of the answer; must come before the first ``take``."""
        self._base = len(text)
        return Delta(self.index, text, scored)

    def take(self, event: TokenEvent) -> Delta:
        """What an event adds to the answer.

        Raises:
            GenerationError: the engine gave up on the request.
            RequestError: it is the request that cannot be finished.
        """
        self.generated += len(event.token_ids)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self.speculation = event.speculation or self.speculation
        if self.finished:
            return Delta(self.index)
        self.trace += event.trace
        if event.finish_reason == "error":
            if event.error is not None and event.error_code is not None:
                raise RequestError(event.error, param=self._options.held_by, code=event.error_code)
            raise GenerationError(event.error or "The engine could not finish this request.")
        if event.finish_reason == "cancelled":
            raise GenerationError("The engine cancelled this request.")
        if self._options.prompt_only:
            self.finished, self.finish_reason = True, "length"
            return self._told(Delta(self.index, finish_reason="length"), ())
        return self._extend(event)

    def _told(self, delta: Delta, token_ids: tuple[int, ...]) -> Delta:
        """The delta with the tokens that it is made of, if the client wants them."""
        if not self._options.token_ids:
            return delta
        prompt_ids, self._prompt_ids = self._prompt_ids, None
        return replace(delta, token_ids=token_ids, prompt_ids=prompt_ids)

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
        scored = self._score(event.logprobs, count) if self._scored and self._options.scored else None
        if event.logprobs is not None:
            self._logprob_sum += sum(entry.logprob for entry in event.logprobs[:count])
        self.returned += count
        self.finished = reason is not None
        told: Literal["stop", "length"] | None = "length" if reason == "length" else "stop" if reason else None
        self.finish_reason = told
        return self._told(Delta(self.index, text, scored, told), ids[:count])

    def _score(self, logprobs: tuple[TokenLogprobs, ...] | None, count: int) -> tuple[ScoredToken, ...]:
        offsets = self._text.offsets[self.returned : self.returned + count]
        offsets += [self._chars] * (count - len(offsets))  # a stop token's text would begin at the end
        return tuple(
            ScoredToken(entry.token_id, entry.logprob, entry.top, self._base + offset)
            for entry, offset in zip((logprobs or ())[:count], offsets, strict=True)
        )


def score_prompt(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], top: int, echoed: str
) -> tuple[ScoredToken, ...]:
    """The prompt's tokens with their logprobs; nothing stands before the first, so that it has none.

    Args:
        top: alternatives of each, at most.
        echoed: the text that the offsets are in. Special tokens that the client wrote are in it, and others are not.
    """
    text = TextStream(tokenizer, skip_special_tokens=tokenizer.decode(prompt_ids, skip_special_tokens=False) != echoed)
    text.push(prompt_ids)
    return tuple(
        ScoredToken(token, entry.logprob if entry else None, entry.top[:top] if entry else (), offset)
        for token, entry, offset in zip(prompt_ids, logprobs, text.offsets, strict=True)
    )
