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
from server.openai.extras import prompt_ids, prompt_logprobs, token_ids, trace
from server.openai.generation import Generation
from server.openai.large import made
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
        deltas = await self._generation.collected()
        choices = await made(deltas, lambda: [self._whole_choice(delta) for delta in deltas])
        answer = {**self._head.payload(KIND, choices), "usage": usage(self._generation)}
        answer |= prompt_ids(deltas[0])
        if (scored := await prompt_logprobs(self._tokenizer, self._generation)) is not None:
            answer["prompt_logprobs"] = scored[0]
        return {**answer, **await trace(self._tokenizer, self._generation)}

    async def chunks(self, stream_usage: StreamUsage) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer: for each choice its role, its content, its finish reason."""
        chunks = Chunks(self._head, CHUNK_KIND, stream_usage, self._generation)
        begun: dict[int, ChoiceDeltas] = {}
        untold: dict[int, tuple[int, ...]] = {}  # token ids that wait for a chunk
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                events = []
                if delta.index not in begun:
                    begun[delta.index] = self._deltas(delta.index)
                    role = self._choice_json(delta.index, ChatDelta("", {"role": "assistant"}))
                    events.append(chunks.chunk(role, delta.index, prompt_ids(delta), begins=True))
                if delta.token_ids is not None:
                    untold[delta.index] = untold.get(delta.index, ()) + delta.token_ids
                for each in begun[delta.index].push(delta):
                    made = None if delta.token_ids is None else untold.pop(delta.index, ())
                    events.append(chunks.chunk(self._choice_json(delta.index, each, made), delta.index))
                if events:
                    yield b"".join(events)
        told = await trace(self._tokenizer, self._generation)
        if stream_usage.final or told:
            yield chunks.last(told)

    def _choice_json(self, index: int, delta: ChatDelta, made: tuple[int, ...] | None = None) -> str:
        """A chunk's choice in JSON; text alone, which most chunks are, without making dicts.

        Args:
            made: the ids of its tokens, when they are told.
        """
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        told = to_json(delta.fields) if delta.fields else "{}"
        if delta.content is not None:
            told = f'{told[:-1]}{"," if delta.fields else ""}"content":{json.dumps(delta.content)}}}'
        logprobs = "null" if delta.scored is None else to_json(self._logprobs(delta.scored))
        ids = "" if made is None else f',"token_ids":{to_json(made)}'
        return f'{{"index":{index},"delta":{told},"logprobs":{logprobs},"finish_reason":{reason}{ids}}}'

    def _deltas(self, index: int) -> ChoiceDeltas:
        if self._reading is None:
            return ContentDeltas()
        return ParsedDeltas(self._reading.new_parser(), self._generation.choices[index])

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        told: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        output = self._generation.returned[delta.index]
        if self._reading is not None:
            told = message(read(self._reading.new_parser(), output, delta))
        return {
            "index": delta.index,
            "message": told,
            "logprobs": self._logprobs(delta.scored),
            "finish_reason": finish_reason(output, delta, called="tool_calls" in told),
            **token_ids(delta),
        }

    def _logprobs(self, scored: Sequence[ScoredToken] | None) -> dict[str, Any] | None:
        if scored is None:
            return None
        content = [scored_token(self._tokenizer, token, self._alternatives) for token in scored]
        return {"content": content, "refusal": None}
