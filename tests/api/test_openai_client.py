"""The official client, validating strictly wherever its own types allow it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from decoding.request import GenerateRequest
from server.fake_client import Death, Line
from tests.api import families
from tests.api.harness import live, saying


@pytest.fixture
def url() -> Iterator[str]:
    with live(saying("print", "()", reason="stop")) as base:
        yield base + "/v1"


def strict(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="sk-x", max_retries=0, _strict_response_validation=True)


def lax(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="sk-x", max_retries=0)


def test_models(url: str) -> None:
    assert [model.id for model in strict(url).models.list()] == ["demo", "alias"]
    assert strict(url).models.retrieve("alias").id == "alias"


def test_completions(url: str) -> None:
    done = strict(url).completions.create(model="demo", prompt="x", n=2, logprobs=2, seed=5)
    assert [choice.text for choice in done.choices] == ["print()"] * 2
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].logprobs is not None
    assert done.choices[0].logprobs.tokens == ["print", "()", "<|endoftext|>"]
    assert done.usage is not None
    assert done.usage.completion_tokens == 6
    assert done.model_extra is not None
    assert done.model_extra["seed"] == 5


def test_fields_beyond_the_core_are_where_the_client_keeps_them(url: str) -> None:
    more = {"return_token_ids": True, "prompt_logprobs": 1, "speculation": {"trace": True}}
    told = strict(url).completions.create(model="demo", prompt="return x", best_of=2, suffix="y", extra_body=more)
    assert told.system_fingerprint is not None
    extra = told.choices[0].model_extra
    assert extra is not None
    assert told.usage is not None
    assert len(extra["prompt_token_ids"]) == len(extra["prompt_logprobs"]) == told.usage.prompt_tokens
    assert told.model_extra is not None
    assert [trace["index"] for trace in told.model_extra["speculation_trace"]] == [0]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y ="}]
    chat = strict(url).chat.completions.create(
        model="demo",
        messages=messages,  # type: ignore[arg-type]
        reasoning_effort="none",
        service_tier="flex",
        extra_body={"continue_final_message": True, "return_token_ids": True, "prompt_logprobs": 0},
    )
    assert chat.system_fingerprint == told.system_fingerprint
    assert chat.model_extra is not None
    assert len(chat.model_extra["prompt_logprobs"]) == len(chat.model_extra["prompt_token_ids"])


def test_completions_stream(url: str) -> None:  # its type has no finish_reason null, so that strict cannot work
    stream = lax(url).completions.create(model="demo", prompt="x", stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "print()"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_chat(url: str) -> None:
    done = strict(url).chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2
    )
    assert done.choices[0].message.content == "print()"
    assert done.choices[0].logprobs is not None
    assert done.choices[0].logprobs.content is not None
    assert bytes(done.choices[0].logprobs.content[0].bytes or []) == b"print"


def test_chat_stream(url: str) -> None:
    stream = strict(url).chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = list(stream)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "print()"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_chat_stream_helper(url: str) -> None:
    with strict(url).chat.completions.stream(model="demo", messages=[{"role": "user", "content": "x"}]) as stream:
        assert stream.get_final_completion().choices[0].message.content == "print()"


def test_speculation_goes_through_extra_body(url: str) -> None:
    done = strict(url).completions.create(model="demo", prompt="x", extra_body={"speculation": {"max_nodes": 4}})
    assert done.usage is not None
    assert done.usage.model_extra is not None
    assert done.usage.model_extra["speculation"]["accepted"] == 3


def test_errors_are_the_clients_own(url: str) -> None:
    client = strict(url)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as overflow:
        client.completions.create(model="demo", prompt="x", max_tokens=2000)
    assert overflow.value.code == "context_length_exceeded"


def test_an_engine_that_dies_on_the_way_is_an_api_error() -> None:
    def dying(request: GenerateRequest) -> Iterator[Line]:
        yield from list(saying("a", " b")(request))[:1]
        yield Death()

    with live(dying) as base:
        stream = lax(base + "/v1").completions.create(model="demo", prompt="x", stream=True)
        with pytest.raises(openai.APIError) as error:
            list(stream)
        assert error.value.code == "engine_dead"
        with pytest.raises(openai.InternalServerError) as dead:
            lax(base + "/v1").completions.create(model="demo", prompt="x")
        assert dead.value.code == "engine_dead"


def test_a_conversation_with_tools_goes_on_with_what_the_client_was_given() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    tools: Any = [families.WEATHER]
    messages: list[Any] = [{"role": "user", "content": "Rain in Oslo?"}]
    with live(saying("Hm. ", call, reason="stop"), template=families.HERMES) as base:
        client = strict(base + "/v1")
        with client.chat.completions.stream(model="demo", messages=messages, tools=tools) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.content == "Hm. "
        assert message.tool_calls is not None
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "yes"}
        for form in (message, message.model_dump(), message.to_dict()):
            done = client.chat.completions.create(model="demo", messages=[*messages, form, result], tools=tools)
            assert done.choices[0].finish_reason == "tool_calls"
