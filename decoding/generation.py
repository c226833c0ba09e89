"""Results of in-process use: events of one request put together to text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decoding.messages import FinishReason, SpeculationStats, StepTrace, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from decoding.text import TextDelta, TextStream, Tokenizer


@dataclass(frozen=True)
class Generation:
    """One finished choice."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    seed: int
    cached_tokens: int
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    speculation: SpeculationStats
    trace: tuple[StepTrace, ...] = ()  # of its first steps, when asked for
    error: str | None = None  # what went wrong, when finish_reason is "error"


@dataclass
class _Choice:
    stream: TextStream
    text: str = ""
    kept: int = 0
    stopped: bool = False
    seed: int = 0
    cached_tokens: int = 0
    last: TokenEvent | None = None


class GenerationBuilder:
    """Collects the events of one request."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.request = request
        prompt, least = request.prompt_ids, request.params.min_tokens
        self._choices = [
            _Choice(TextStream(tokenizer, prompt, stop, min_tokens=least)) for _ in range(request.params.n)
        ]
        self._tokens: list[list[int]] = [[] for _ in self._choices]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in self._choices]
        self._traces: list[list[StepTrace]] = [[] for _ in self._choices]
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.deltas: deque[TextDelta] = deque()  # new text of all choices, for whoever streams

    @property
    def is_open(self) -> bool:
        """A choice has not ended yet."""
        return any(choice.last is None for choice in self._choices)

    def add(self, event: TokenEvent, cancel: Callable[[str, int], Any]) -> None:
        """Take in an event; a stop string that it completes ends the choice by ``cancel``, whose event comes here."""
        choice = self._choices[event.choice]
        if event.finish_reason is not None:
            choice.last = event
        if choice.stopped:
            return
        if event.seed is not None:
            choice.seed, choice.cached_tokens = event.seed, event.cached_tokens
        self._prompt_logprobs = event.prompt_logprobs or self._prompt_logprobs
        self._tokens[event.choice].extend(event.token_ids)
        self._logprobs[event.choice].extend(event.logprobs or ())
        self._traces[event.choice].extend(event.trace)
        deltas = [choice.stream.push(event.token_ids)]
        if event.finish_reason is not None and not deltas[0].stopped:
            deltas.append(choice.stream.finish())
        for delta in deltas:
            choice.text += delta.text
            choice.kept = delta.token_count
            choice.stopped = choice.stopped or delta.stopped
        self.deltas.extend(delta for delta in deltas if delta.text)
        if choice.stopped and event.finish_reason is None:
            cancel(self.request.request_id, event.choice)

    def generations(self) -> list[Generation]:
        """The finished choices, in order."""
        return [self._generation(index, choice) for index, choice in enumerate(self._choices)]

    def _generation(self, index: int, choice: _Choice) -> Generation:
        assert choice.last is not None  # the request has ended
        assert choice.last.finish_reason is not None
        logprobs = self._logprobs[index][: choice.kept] if self.request.params.logprobs is not None else None
        return Generation(
            text=choice.text,
            token_ids=self._tokens[index][: choice.kept],
            finish_reason="stop" if choice.stopped else choice.last.finish_reason,
            seed=choice.seed,
            cached_tokens=choice.cached_tokens,
            logprobs=logprobs,
            prompt_logprobs=list(self._prompt_logprobs) if self._prompt_logprobs is not None else None,
            speculation=choice.last.speculation or SpeculationStats(),
            trace=tuple(self._traces[index]),
            error=choice.last.error,
        )
