"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from decoding.text import Tokenizer
from server.openai.chat_deltas import ChatDelta, ChoiceDeltas, ContentDeltas, ParsedDeltas, finish_reason, message, read
from server.openai.chat_logprobs import scored_token
from server.openai.choice_output import Delta, ScoredToken
from server.openai.chunks import Chunks
from server.openai.generation import Generation
from server.openai.output_parser import Reading
from server.openai.rendering import Head, StreamUsage, usage
from server.openai.sse import to_json

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


class ChatRenderer:
    """Renders an answer.

    Args:
        alternatives: of each scored token.
        reading: how the choices are read; None: they are text.
    """

    def __init__(
        self,
        head: Head,
        tokenizer: Tokenizer,
        generation: Generation,
        alternatives: int,
        reading: Reading | None = None,
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._generation = generation
        self._alternatives = alternatives
        self._reading = reading

    async def whole(self) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        choices = [self._whole_choice(delta) for delta in await self._generation.collected()]
        return {**self._head.payload(KIND, choices), "usage": usage(self._generation)}

    async def chunks(self, stream_usage: StreamUsage) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer: for each choice its role, its content, its finish reason."""
        chunks = Chunks(self._head, CHUNK_KIND, stream_usage, self._generation)
        begun: dict[int, ChoiceDeltas] = {}
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                events = []
                if delta.index not in begun:
                    begun[delta.index] = self._deltas(delta.index)
                    role = ChatDelta("", {"role": "assistant"})
                    events.append(chunks.chunk(self._choice_json(delta.index, role)))
                for each in begun[delta.index].push(delta):
                    events.append(chunks.chunk(self._choice_json(delta.index, each)))
                if events:
                    yield b"".join(events)
        if stream_usage.final:
            yield chunks.last()

    def _choice_json(self, index: int, delta: ChatDelta) -> str:
        """A chunk's choice in JSON; text alone, which most chunks are, without making dicts."""
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        told = to_json(delta.fields) if delta.fields else "{}"
        if delta.content is not None:
            told = f'{told[:-1]}{"," if delta.fields else ""}"content":{json.dumps(delta.content)}}}'
        logprobs = "null" if delta.scored is None else to_json(self._logprobs(delta.scored))
        return f'{{"index":{index},"delta":{told},"logprobs":{logprobs},"finish_reason":{reason}}}'

    def _deltas(self, index: int) -> ChoiceDeltas:
        if self._reading is None:
            return ContentDeltas()
        return ParsedDeltas(self._reading.new_parser(), self._generation.choices[index])

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        told: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if self._reading is not None:
            told = message(read(self._reading.new_parser(), self._generation.choices[delta.index], delta))
        return {
            "index": delta.index,
            "message": told,
            "logprobs": self._logprobs(delta.scored),
            "finish_reason": finish_reason(delta, called="tool_calls" in told),
        }

    def _logprobs(self, scored: Sequence[ScoredToken] | None) -> dict[str, Any] | None:
        if scored is None:
            return None
        content = [scored_token(self._tokenizer, token, self._alternatives) for token in scored]
        return {"content": content, "refusal": None}
