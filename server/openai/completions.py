"""Answers of /v1/completions, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from decoding.text import Tokenizer
from server.openai.choice_output import Delta, ScoredToken
from server.openai.chunks import Chunks
from server.openai.extras import prompt_ids, prompt_logprobs, token_ids, trace
from server.openai.generation import Generation
from server.openai.large import made
from server.openai.rendering import Head, StreamUsage, finite, token_name, usage
from server.openai.sse import to_json

KIND = "text_completion"


class CompletionRenderer:
    def __init__(self, head: Head, tokenizer: Tokenizer, generation: Generation) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._generation = generation

    async def whole(self) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        deltas = await self._generation.collected()
        choices = await made(deltas, lambda: [self._choice(delta) for delta in deltas])
        if (scored := await prompt_logprobs(self._tokenizer, self._generation)) is not None:
            for choice in choices:
                choice["prompt_logprobs"] = scored[choice["index"] * len(scored) // len(choices)]
        payload = self._head.payload(KIND, choices)
        told = await trace(self._tokenizer, self._generation)
        return {**payload, "usage": usage(self._generation), **told}

    async def chunks(self, stream_usage: StreamUsage) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer."""
        chunks = Chunks(self._head, KIND, stream_usage, self._generation)
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                yield chunks.chunk(self._choice_json(delta), delta.index)
        told = await trace(self._tokenizer, self._generation)
        if stream_usage.final or told:
            yield chunks.last(told)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None if delta.scored is None else completion_logprobs(self._tokenizer, delta.scored),
            "finish_reason": delta.finish_reason,
            **prompt_ids(delta),
            **token_ids(delta),
        }

    def _choice_json(self, delta: Delta) -> str:
        """``_choice`` in JSON; text alone, which most chunks are, without making the dict."""
        if delta.scored is not None or delta.token_ids is not None:
            return to_json(self._choice(delta))
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        text = json.dumps(delta.text)
        return f'{{"index":{delta.index},"text":{text},"logprobs":null,"finish_reason":{reason}}}'


def completion_logprobs(tokenizer: Tokenizer, scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """The endpoint's four parallel lists. The chosen token is always in its ``top_logprobs``, with the same value."""
    return {
        "tokens": [token_name(tokenizer, token.token_id) for token in scored],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in scored],
        "top_logprobs": [_top(tokenizer, token) for token in scored],
        "text_offset": [token.offset for token in scored],
    }


def _top(tokenizer: Tokenizer, token: ScoredToken) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for other, logprob in token.top:
        top.setdefault(token_name(tokenizer, other), finite(logprob))
    top[token_name(tokenizer, token.token_id)] = finite(token.logprob)
    return top
