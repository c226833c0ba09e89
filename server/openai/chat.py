"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from decoding.text import Tokenizer
from server.openai.choice_output import Delta, ScoredToken
from server.openai.extras import prompt_ids, prompt_logprobs, token_ids, trace
from server.openai.generation import Generation
from server.openai.rendering import Head, StreamUsage, finite, token_name, usage

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


class ChatRenderer:
    def __init__(self, head: Head, tokenizer: Tokenizer, generation: Generation, alternatives: int) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._generation = generation
        self._alternatives = alternatives

    async def whole(self) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        deltas = await self._generation.collected()
        choices = [self._whole_choice(delta) for delta in deltas]
        answer = {**self._head.payload(KIND, choices), "usage": usage(self._generation)}
        answer |= prompt_ids(deltas[0])
        if (scored := await prompt_logprobs(self._tokenizer, self._generation)) is not None:
            answer["prompt_logprobs"] = scored[0]
        return {**answer, **await trace(self._tokenizer, self._generation)}

    async def chunks(self, stream_usage: StreamUsage) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer: for each choice its role, its content, its finish reason."""
        begun: set[int] = set()
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                for choice in self._chunk_choices(delta, begins=delta.index not in begun):
                    yield stream_usage.attach(self._head.payload(CHUNK_KIND, [choice]), self._generation)
                begun.add(delta.index)
        if stream_usage.final:
            yield {**self._head.payload(CHUNK_KIND, []), "usage": usage(self._generation)}

    def _chunk_choices(self, delta: Delta, *, begins: bool) -> list[dict[str, Any]]:
        choices = []
        if begins:
            choices.append(_chunk_choice(delta.index, {"role": "assistant", "content": ""}))
        if delta.text or delta.scored:
            choices.append(_chunk_choice(delta.index, {"content": delta.text}, self._logprobs(delta.scored)))
        if delta.finish_reason is not None:
            choices.append({**_chunk_choice(delta.index, {}), "finish_reason": delta.finish_reason})
        return choices

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta.scored),
            "finish_reason": delta.finish_reason,
            **token_ids(delta),
        }

    def _logprobs(self, scored: Sequence[ScoredToken] | None) -> dict[str, Any] | None:
        if scored is None:
            return None
        return {"content": [self._scored_token(token) for token in scored], "refusal": None}

    def _scored_token(self, token: ScoredToken) -> dict[str, Any]:
        top = [self._entry(other, logprob) for other, logprob in token.top[: self._alternatives]]
        return {**self._entry(token.token_id, token.logprob or 0.0), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = list(self._tokenizer.token_bytes(token_id))
        return {"token": token_name(self._tokenizer, token_id), "logprob": finite(logprob), "bytes": spelled}


def _chunk_choice(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
