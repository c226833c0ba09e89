"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from decoding.text import Tokenizer
from server.openai.choice_output import Delta, ScoredToken
from server.openai.chunks import Chunks
from server.openai.extras import prompt_ids, prompt_logprobs, token_ids, trace
from server.openai.generation import Generation
from server.openai.rendering import Head, StreamUsage, finite, token_name, usage
from server.openai.sse import to_json

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


@dataclass(frozen=True)
class ChatDelta:
    """What one chunk tells of a choice.

    Attributes:
        content: text of the answer; None: the chunk has none.
        fields: the delta's other fields, in JSON's types.
    """

    content: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    scored: tuple[ScoredToken, ...] | None = None
    finish_reason: str | None = None


class ChoiceDeltas(Protocol):
    """Makes one choice's output into the deltas of chat."""

    def push(self, delta: Delta) -> list[ChatDelta]:
        """The deltas that what was gained makes certain, in order; the last one of all has the finish reason."""
        ...


class ContentDeltas:
    """An output that is text and nothing else."""

    def push(self, delta: Delta) -> list[ChatDelta]:
        deltas = []
        if delta.text or delta.scored:
            deltas.append(ChatDelta(delta.text, scored=delta.scored))
        if delta.finish_reason is not None:
            deltas.append(ChatDelta(finish_reason=delta.finish_reason))
        return deltas


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

    async def chunks(self, stream_usage: StreamUsage) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer: for each choice its role, its content, its finish reason."""
        chunks = Chunks(self._head, CHUNK_KIND, stream_usage, self._generation)
        begun: dict[int, ChoiceDeltas] = {}
        untold: dict[int, tuple[int, ...]] = {}  # token ids that wait for a chunk
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                events = []
                if delta.index not in begun:
                    begun[delta.index] = ContentDeltas()
                    role = self._choice_json(delta.index, ChatDelta("", {"role": "assistant"}))
                    events.append(chunks.chunk(role, delta.index, prompt_ids(delta)))
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
