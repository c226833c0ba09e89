"""/v1/responses: items in, items out, events in order, and the official client as a strict judge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.fake_client import Death, Line, Pause, Script
from server.settings import ServerSettings
from tests.api.families import CALL, HERMES, THINKING
from tests.api.harness import api, fake, ids, live, saying, tokenizer

URL = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
THOUGHT = ("Hm", ".\n</think>\n\n", "Rain. ", f"<tool_call>{CALL}", "</tool_call>")


def answer(body: dict[str, Any], script: Script, template: str | None = None) -> dict[str, Any]:
    with api(script, template=template) as client:
        response = client.post(URL, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def streamed(body: dict[str, Any], script: Script, template: str | None = None) -> list[dict[str, Any]]:
    with api(script, template=template) as client:
        response = client.post(URL, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return numbered(response.text)


def numbered(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must be well-formed."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_text_in_text_out() -> None:
    body = answer(
        {"input": "import os", "seed": 9, "max_output_tokens": 7, "metadata": {"a": "b"}},
        saying("x", "y", reason="stop"),
    )
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["model"], body["seed"]) == ("response", "completed", "demo", 9)
    (item,) = body["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "xy", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    prompt = len(tokenizer().apply_chat_template([{"role": "user", "content": "import os"}]))
    assert {name: body["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")} == {
        "input_tokens": prompt,
        "output_tokens": 3,
        "total_tokens": prompt + 3,
    }
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 0
    assert (body["max_output_tokens"], body["metadata"], body["store"]) == (7, {"a": "b"}, False)


def test_the_engine_gets_what_chat_would_give_it() -> None:
    engine = fake(saying("x"))
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3, "stop": ["z"], "speculation": {"max_nodes": 2}}
    with api(engine) as client:
        parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
        items = [{"role": "user", "content": parts}, {"type": "message", "role": "assistant", "content": "c"}]
        body = {"input": items, "instructions": "be", "max_output_tokens": 5, **sampling}
        assert client.post(URL, json=body).status_code == 200
        messages = [("system", "be"), ("user", "ab"), ("assistant", "c")]
        chat = {"messages": [{"role": role, "content": content} for role, content in messages], "max_tokens": 5}
        assert client.post("/v1/chat/completions", json={**chat, **sampling}).status_code == 200
    ours, theirs = engine.requests
    assert (ours.prompt_ids, ours.params, ours.speculation) == (theirs.prompt_ids, theirs.params, theirs.speculation)


def test_an_answer_that_the_limit_cuts_is_incomplete() -> None:
    body = answer({"input": "x"}, saying("a"))
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert streamed({"input": "x"}, saying("a"))[-1]["type"] == "response.incomplete"


def test_events_tell_the_whole_answer() -> None:
    body = {"input": "x", "tools": [WEATHER]}
    found = streamed(body, saying(*THOUGHT, reason="stop"), THINKING)
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    last = found[-1]["response"]
    assert [event["item"] for event in found if event["type"] == "response.output_item.done"] == last["output"]
    whole = answer(body, saying(*THOUGHT, reason="stop"), THINKING)
    assert [plain(item) for item in last["output"]] == [plain(item) for item in whole["output"]]
    reasoning, message, call = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Rain. "
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Oslo"}')
    assert call["call_id"].startswith("call_")
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert whole["usage"] == last["usage"]


def plain(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def test_an_output_without_text_is_an_empty_message() -> None:
    for output in (
        answer({"input": "x"}, saying("", reason="stop"))["output"],
        streamed({"input": "x"}, saying("", reason="stop"))[-1]["response"]["output"],
    ):
        assert output[0]["content"][0]["text"] == ""


def test_a_failed_call_is_text_in_an_answer_and_incomplete_in_a_stream() -> None:
    said = '<tool_call>{"name": "weather", "arguments": {"city": Oslo}}</tool_call>'
    body = {"input": "x", "tools": [WEATHER]}
    (item,) = answer(body, saying(said, reason="stop"), HERMES)["output"]
    assert item["content"][0]["text"] == said
    output = streamed(body, saying(said, reason="stop"), HERMES)[-1]["response"]["output"]
    assert (output[0]["type"], output[0]["status"]) == ("function_call", "incomplete")


def test_logprobs_of_text() -> None:
    body = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = answer(body, saying("a b"))["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", " b"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    found = streamed(body, saying("a", " b"))
    told = [e for event in found if event["type"] == "response.output_text.delta" for e in event["logprobs"]]
    assert told == part["logprobs"]


def test_items_of_a_turn_are_one_message_for_the_template() -> None:
    engine = fake(saying("x"))
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Wait."}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Oslo"}', "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "assistant", "content": "Wet."},
        {"role": "assistant", "content": "Really."},
    ]
    with api(engine, template=HERMES) as client:
        response = client.post(URL, json={"input": items, "instructions": "Be brief."})
    assert response.status_code == 200, response.text
    assert tokenizer().decode(engine.requests[0].prompt_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nWait.<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\nWet.<|im_end|>\n"
        "<|im_start|>assistant\nReally.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_is_held_to_a_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    engine = fake(saying('{"a":1}', reason="stop"))
    with api(engine) as client:
        body = {
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        }
        response = client.post(URL, json=body)
    assert response.status_code == 200, response.text
    assert engine.requests[0].grammar is not None
    assert json.loads(engine.requests[0].grammar.source) == schema
    assert response.json()["text"]["format"]["schema"] == schema


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing_required_parameter"),
        ({"input": [{"role": "king", "content": "x"}]}, "input.0.role", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "unsupported_value",
        ),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
            "input.0.call_id",
            "missing_required_parameter",
        ),
        ({"input": "x", "store": True}, "store", "unsupported_parameter"),
        ({"input": "x", "background": True}, "background", "unsupported_parameter"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"input": "x", "conversation": "conv_1"}, "conversation", "invalid_value"),
        ({"input": "x", "truncation": "auto"}, "truncation", "invalid_value"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include.0", "invalid_value"),
        ({"input": "x", "top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"input": "x", "temperature": -1}, "temperature", "invalid_value"),
        ({"input": "x", "max_tokens": 5}, "max_tokens", "unknown_parameter"),
        ({"input": "x", "n": 2}, "n", "unknown_parameter"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"input": "x", "max_output_tokens": 5000}, "input", "context_length_exceeded"),
        ({"input": "x " * 3000}, "input", "context_length_exceeded"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"input": "x", "tools": [WEATHER, WEATHER]}, "tools.1.name", "invalid_value"),
        ({"input": "x", "tools": [WEATHER]}, "tools", "unsupported_parameter"),
        (
            {"input": "x", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "rm"}},
            "tool_choice.name",
            "invalid_value",
        ),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing_required_parameter"),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}}}},
            "text.format.schema",
            "invalid_grammar",
        ),
        (
            {
                "input": "x",
                "tools": [WEATHER, {**WEATHER, "name": "b", "parameters": {"not": {}}}],
                "tool_choice": "required",
            },
            "tools.1.parameters",
            "invalid_grammar",
        ),
        ({"input": "x", "stream_options": {"include_obfuscation": True}}, "stream_options", "invalid_value"),
        ({"input": "x", "model": "nope"}, "model", "model_not_found"),
    ],
)
def test_mistakes_are_named(body: dict[str, Any], param: str, code: str) -> None:
    with api() as client:
        response = client.post(URL, json=body)
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_a_stream_that_is_asked_for_its_usage_as_chat_is_has_it() -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    with api() as client:
        response = client.post(
            URL, json={"input": "x", "max_output_tokens": 2, "stream": True, "stream_options": options}
        )
    assert response.status_code == 200, response.text
    assert '"output_tokens":2' in response.text


def dying(request: GenerateRequest) -> Iterable[Line]:
    yield TokenEvent(request.request_id, 0, ids("a"))
    yield Death()


def test_an_output_that_cannot_be_held_to_its_form_names_the_field() -> None:
    def stuck(request: GenerateRequest) -> Iterable[Line]:
        error = {"error": "It takes too long.", "error_code": "grammar_too_complex"}
        yield TokenEvent(request.request_id, 0, finish_reason="error", **error)  # type: ignore[arg-type]

    with api(stuck) as client:
        for stream in (False, True):
            body = {"input": "x", "text": {"format": {"type": "json_object"}}, "stream": stream}
            response = client.post(URL, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "text.format")


def test_an_error_on_the_way_fails_the_response() -> None:
    *_, failed, error = streamed({"input": "x"}, dying)
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["code"] == "server_error"
    assert (error["type"], error["code"], error["error"]["code"]) == ("error", "engine_dead", "engine_dead")


@pytest.mark.parametrize("pinged", [False, True])
def test_a_deadline_on_the_way_fails_the_response(pinged: bool) -> None:
    def slow(request: GenerateRequest) -> Iterable[Line]:
        yield from () if pinged else [TokenEvent(request.request_id, 0, ids("a"))]
        yield Pause(30)

    with live(slow, ServerSettings(("demo",), ping_seconds=0.1 if pinged else 30)) as url:
        late = {"x-request-timeout": "0.4"}
        text = httpx.post(url + URL, json={"input": "x", "stream": True}, headers=late).text
    assert text.startswith(": ping\n\n") == pinged
    begun, _, *_, failed, error = numbered(text.replace(": ping\n\n", ""))
    assert [begun["type"], failed["type"], error["type"]] == ["response.created", "response.failed", "error"]
    assert failed["response"]["id"] == begun["response"]["id"]
    assert error["code"] == "deadline_exceeded"


# the official client ---------------------------------------------------------------------------------------------


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with live(saying(*THOUGHT, reason="stop"), template=THINKING) as url:
        yield openai.OpenAI(base_url=url + "/v1", api_key="sk-x", max_retries=0, _strict_response_validation=True)


def test_the_client_reads_an_answer(client: openai.OpenAI) -> None:
    response = client.responses.create(model="demo", input="x", tools=[WEATHER])  # type: ignore[list-item]
    assert response.output_text == "Rain. "
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_the_client_reads_a_stream_and_sends_it_back(client: openai.OpenAI) -> None:
    tools: Any = [WEATHER]
    with client.responses.stream(model="demo", input="x", tools=tools) as stream:
        seen = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.delta", "response.completed"} <= seen
    assert final.output_text == "Rain. "
    call = next(item for item in final.output if item.type == "function_call")
    history: Any = [{"role": "user", "content": "x"}, *final.output]
    for item in final.output:
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": item.type})
    assert client.responses.create(model="demo", input=history, tools=tools).status == "completed"
    dumped: Any = [
        {"role": "user", "content": "x"},
        *(item.model_dump() for item in final.output),
    ]
    assert client.responses.create(model="demo", input=dumped, tools=tools).status == "completed"


class City(BaseModel):
    city: str


def test_the_client_parses_what_text_is_held_to() -> None:
    with live(saying('{"city": "Oslo"}', reason="stop")) as url:
        strict = openai.OpenAI(base_url=url + "/v1", api_key="sk-x", max_retries=0, _strict_response_validation=True)
        assert strict.responses.parse(model="demo", input="x", text_format=City).output_parsed == City(city="Oslo")


def test_the_client_raises_what_fails_on_the_way() -> None:
    with live(dying) as url:
        plain_client = openai.OpenAI(base_url=url + "/v1", api_key="sk-x", max_retries=0)
        with pytest.raises(openai.APIError, match="engine"):
            list(plain_client.responses.create(model="demo", input="x", stream=True))
