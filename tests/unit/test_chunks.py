"""Chunks from templates are those that dicts would make, byte for byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.request import GenerateRequest
from server.openai.chat import ChatRenderer
from server.openai.chat_deltas import ChatDelta
from server.openai.choice_output import Delta, OutputOptions, ScoredToken
from server.openai.chunks import Chunks
from server.openai.completions import CompletionRenderer
from server.openai.generation import Generation, PromptRequest
from server.openai.rendering import Head, StreamUsage, usage
from server.openai.sse import event_bytes
from tests.api.harness import fake, ids, saying, tokenizer

MODEL = 'a "choices":[] model\u2028'  # as awkward as a name can be
HEAD = Head(MODEL, 7, "cmpl", created=1, token="t")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NONE, FINAL, CONTINUOUS = StreamUsage(), StreamUsage(final=True), StreamUsage(final=True, continuous=True)


def one_choice() -> PromptRequest:
    return PromptRequest(GenerateRequest("r", (1, 2)))


class Scripted(Generation):
    """Deltas without an engine."""

    def __init__(self, *deltas: Delta) -> None:
        super().__init__(fake(), tokenizer(), [one_choice()], OutputOptions(), lambda index, event: None)
        self._deltas = deltas

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        for delta in self._deltas:
            yield delta


def streamed(renderer: CompletionRenderer | ChatRenderer, stream_usage: StreamUsage = NONE) -> list[bytes]:
    """The events of a stream, each with its frame."""

    async def main() -> bytes:
        return b"".join([event async for event in renderer.chunks(stream_usage)])

    whole = asyncio.run(main())
    return [frame + b"\n\n" for frame in whole.split(b"\n\n")[:-1]]


def payload(kind: str, choice: dict[str, Any], **more: Any) -> bytes:
    return event_bytes({**HEAD.payload(kind, [choice]), **more})


@given(TEXTS, st.sampled_from([None, "stop", "length"]), st.integers(0, 1000))
def test_a_completions_chunk(text: str, reason: Any, index: int) -> None:
    renderer = CompletionRenderer(HEAD, tokenizer(), Scripted(Delta(index, text, None, reason)))
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
    assert streamed(renderer) == [payload("text_completion", choice)]


@given(TEXTS, st.sampled_from([None, "stop", "length"]))
def test_a_chats_chunks(text: str, reason: Any) -> None:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 3, "delta": delta, "logprobs": None, "finish_reason": reason}
        return payload("chat.completion.chunk", choice)

    renderer = ChatRenderer(HEAD, tokenizer(), Scripted(Delta(3, text, None, reason)), 0)
    expected = [chunk({"role": "assistant", "content": ""})]
    expected += [chunk({"content": text})] if text else []
    expected += [chunk({}, reason)] if reason else []
    assert streamed(renderer) == expected


def test_a_chat_delta_with_other_fields() -> None:
    renderer = ChatRenderer(HEAD, tokenizer(), Scripted(), 0)
    call = {"tool_calls": [{"index": 0, "function": {"arguments": "\u2028{"}}]}
    for delta, expected in (
        (ChatDelta(fields=call), call),
        (ChatDelta("x", call), {**call, "content": "x"}),
        (ChatDelta(), {}),
    ):
        found = renderer._choice_json(0, delta)
        assert found.isascii()
        assert json.loads(found)["delta"] == expected


@pytest.mark.parametrize("chat", [False, True])
def test_logprobs_are_those_of_the_whole_answer(chat: bool) -> None:
    (token,) = ids("return")
    delta = Delta(0, "return", (ScoredToken(token, -0.5, ((token, -0.5), (5, -1.5)), 0),), "length")
    renderer: CompletionRenderer | ChatRenderer
    if chat:
        renderer = ChatRenderer(HEAD, tokenizer(), Scripted(delta), 2)
    else:
        renderer = CompletionRenderer(HEAD, tokenizer(), Scripted(delta))
    whole = asyncio.run(renderer.whole())["choices"][0]["logprobs"]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in streamed(renderer)]
    (found,) = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"] is not None]
    assert found == whole


@pytest.mark.parametrize(("stream_usage", "told"), [(NONE, {}), (FINAL, {"usage": None})])
def test_usage_of_a_chunk_is_absent_or_null(stream_usage: StreamUsage, told: dict[str, None]) -> None:
    chunks = Chunks(HEAD, "k", stream_usage, Scripted())
    assert chunks.chunk('{"index":0}', 0) == payload("k", {"index": 0}, **told)


def test_continuous_usage_is_in_every_chunk() -> None:
    generation = Generation(fake(), tokenizer(), [one_choice()], OutputOptions(), lambda index, event: None)
    chunks = Chunks(HEAD, "k", CONTINUOUS, generation)
    own = {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    assert chunks.chunk('{"index":0}', 0) == payload("k", {"index": 0}, usage=own)
    assert chunks.chunk('{"index":0}', 0, {"x": 1}) == payload("k", {"index": 0}, x=1, usage=own)
    assert chunks.last({}) == event_bytes({**HEAD.payload("k", []), "usage": usage(generation)})


def test_other_fields_stand_beside_the_choice() -> None:
    for stream_usage, told in ((NONE, {}), (FINAL, {"usage": None})):
        chunks = Chunks(HEAD, "k", stream_usage, Scripted())
        assert chunks.chunk('{"index":0}', 0, {"x": ["\u2028"]}) == payload("k", {"index": 0}, x=["\u2028"], **told)
        assert chunks.chunk('{"index":0}', 0, {}) == payload("k", {"index": 0}, **told)
    assert Chunks(HEAD, "k", NONE, Scripted()).last({"x": 1}) == event_bytes({**HEAD.payload("k", []), "x": 1})


def test_a_script_through_an_engine_is_the_same_text() -> None:
    request = PromptRequest(GenerateRequest("r", ids("x")))
    generation = Generation(
        fake(saying("a\u2028", "\u0085b")), tokenizer(), [request], OutputOptions(), lambda index, event: None
    )
    chunks = streamed(CompletionRenderer(HEAD, tokenizer(), generation))
    texts = [json.loads(chunk.removeprefix(b"data: "))["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "a\u2028\u0085b"
    assert all(chunk.isascii() for chunk in chunks)
