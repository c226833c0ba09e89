"""/openapi.json is true: its routes are those there are, its shapes those of real answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.openapi.utils import get_openapi
from jsonschema import Draft202012Validator

from decoding.messages import DrafterStats, SpeculationStats, TokenEvent
from decoding.request import GenerateRequest
from server.app import build_app
from server.openai.validation import IGNORED, UNSUPPORTED
from server.openapi import document
from tests.api.families import CALL, THINKING, TOOLS, WEATHER
from tests.api.harness import SETTINGS, api, events, fake, ids, saying, tokenizer

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "hi"}]
STATS = SpeculationStats(4, 10, 6, {"prediction": DrafterStats(8, 5)})

COMPLETION_REQUESTS: list[dict[str, Any]] = [
    {"prompt": "x"},
    {"prompt": ["x", "y"], "n": 2, "logprobs": 2},
    {"prompt": "x y", "echo": True, "logprobs": 1},
    {"prompt": "x", "prediction": {"type": "content", "content": "y"}},
    {"prompt": ["x", "y"], "n": 2, "return_token_ids": True},
    {"prompt": "x", "speculation": {"trace": True}},
]
CHAT_REQUESTS: list[dict[str, Any]] = [
    {"messages": HELLO},
    {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"messages": HELLO, "prediction": {"type": "content", "content": "y"}},
    {"messages": HELLO, "n": 2, "return_token_ids": True},
    {"messages": HELLO, "speculation": {"trace": True}},
]
WHOLE = [
    (COMPLETIONS, {"prompt": ["x", "y"], "best_of": 2, "prompt_logprobs": 1}),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 2}),
    ("/tokenize", {"prompt": "x"}),
    ("/tokenize", {"messages": HELLO, "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6]}),
]
REQUESTS = [(COMPLETIONS, body) for body in COMPLETION_REQUESTS] + [(CHAT, body) for body in CHAT_REQUESTS]


def faults(schema: dict[str, Any], value: Any) -> list[str]:
    whole = {"components": document()["components"], **schema}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(whole).iter_errors(value)]


def content(response: httpx.Response, path: str) -> dict[str, Any]:
    """What the document says of an answer; checks its status, its media type and its headers."""
    method = response.request.method.lower()
    answer = document()["paths"][path][method]["responses"][str(response.status_code)]
    for name, header in answer["headers"].items():
        assert not header["required"] or name in response.headers
    media_type = response.headers["content-type"].partition(";")[0]
    found: dict[str, Any] = answer["content"][media_type]["schema"]
    return found


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "$ref")
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from references(each)


def test_it_is_served_and_pages_are_not() -> None:
    with api() as client:
        assert client.get("/openapi.json").json() == document()
        assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_every_route_is_in_it_and_nothing_else() -> None:
    app = build_app(fake(), tokenizer(), SETTINGS)
    with warnings.catch_warnings(action="ignore"):  # it gives GET and HEAD of one path one name
        listed = get_openapi(title="", version="", routes=app.routes)["paths"]
    there = {(path, method) for path, methods in listed.items() for method in methods}
    assert there == {(path, method) for path, methods in document()["paths"].items() for method in methods}


def test_schemas_are_schemas_and_references_lead_somewhere() -> None:
    schemas = document()["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    found = set(references(document()))
    assert found == {f"#/components/schemas/{name}" for name in schemas}


def test_an_object_has_no_other_fields_than_it_shows() -> None:
    schemas = document()["components"]["schemas"]
    open_ones = [name for name, schema in schemas.items() if schema.get("additionalProperties") is not False]
    assert open_ones == []


@pytest.mark.parametrize(("path", "body"), [*REQUESTS, *WHOLE])
def test_answers_have_the_shape_that_it_shows(path: str, body: dict[str, Any]) -> None:
    with api(saying("a", " b", reason="stop", stats=STATS)) as client:
        response = client.post(path, json={"model": "demo", **body})
    assert response.status_code == 200
    assert faults(content(response, path), response.json()) == []


@pytest.mark.parametrize(("path", "body"), REQUESTS)
@pytest.mark.parametrize(
    "options", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_chunks_have_the_shape_that_it_shows(path: str, body: dict[str, Any], options: Any) -> None:
    with api(saying("a", " b", stats=STATS)) as client:
        response = client.post(path, json={**body, "stream": True, "stream_options": options})
    schema = content(response, path)["x-event"]
    assert [faults(schema, chunk) for chunk in events(response)] == [[]] * len(events(response))


THOUGHT = ("Hm", ".\n</think>\n\n", "Rain. ", f"<tool_call>{CALL}", "</tool_call>")
FLAT = {"type": "function", **WEATHER["function"], "strict": True}
WITH_TOOLS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO, "tools": TOOLS, "logprobs": True}),
    (RESPONSES, {"input": "x", "tools": [FLAT], "metadata": {"a": "b"}}),
    (RESPONSES, {"input": HELLO, "top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
]


@pytest.mark.parametrize(("path", "body"), WITH_TOOLS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_thoughts_and_calls_have_the_shape_that_it_shows(path: str, body: dict[str, Any], reason: str) -> None:
    with api(saying(*THOUGHT, reason=reason), template=THINKING) as client:
        whole = client.post(path, json=body)
        stream = client.post(path, json={**body, "stream": True})
    assert (whole.status_code, stream.status_code) == (200, 200)
    assert faults(content(whole, path), whole.json()) == []
    lines = [line for line in stream.text.split("\n") if line.startswith("data: {")]
    assert len(lines) > len(THOUGHT)
    chunk = content(stream, path)["x-event"]
    assert [faults(chunk, json.loads(line.removeprefix("data: "))) for line in lines] == [[]] * len(lines)


def test_an_error_in_a_stream_of_a_response_has_the_shape_that_it_shows() -> None:
    def failing(request: GenerateRequest) -> Iterator[TokenEvent]:
        yield TokenEvent(request.request_id, 0, ids("a"))
        yield TokenEvent(request.request_id, 0, finish_reason="error", error="The cache is broken.")

    with api(failing) as client:
        stream = client.post(RESPONSES, json={"input": "x", "stream": True})
    found = [json.loads(line[6:]) for line in stream.text.split("\n") if line.startswith("data: {")]
    assert found[-1]["type"] == "error"
    assert [faults(content(stream, RESPONSES)["x-event"], event) for event in found] == [[]] * len(found)


def test_errors_have_the_shape_that_it_shows() -> None:
    engine = fake()
    with api(engine) as client:
        text = {"content-type": "text/plain"}
        responses = [
            (COMPLETIONS, client.post(COMPLETIONS, json={"prompt": 5})),
            (CHAT, client.post(CHAT, json={"messages": HELLO, "model": "nope"})),
            (CHAT, client.post(CHAT, content=b"{}", headers=text)),
            ("/v1/models/{name}", client.get("/v1/models/nope")),
        ]
        engine.die()
        responses += [(COMPLETIONS, client.post(COMPLETIONS, json={"prompt": "x"})), ("/health", client.get("/health"))]
    assert [response.status_code for _, response in responses] == [400, 404, 415, 404, 503, 503]
    for path, response in responses:
        assert faults(content(response, path), response.json()) == []


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/live", "/version", "/metrics", "/openapi.json"])
def test_what_has_no_body_answers_as_it_shows(path: str) -> None:
    with api() as client:
        response = client.get(path)
    schema = content(response, path)
    value = response.json() if "json" in response.headers["content-type"] else response.text
    assert faults(schema, value) == []


@pytest.mark.parametrize(("path", "name"), [(COMPLETIONS, "CompletionFields"), (CHAT, "ChatFields")])
def test_refused_fields_allow_nothing_but_their_neutral_values(path: str, name: str) -> None:
    properties = document()["components"]["schemas"][name]["properties"]
    assert set(properties) >= set(IGNORED) | set(UNSUPPORTED)
    assert properties["use_beam_search"]["enum"] == [None, False]
    assert faults(properties["user"], {"any": "thing"}) == []


def test_it_is_plain_json() -> None:
    assert json.loads(json.dumps(document(), allow_nan=False)) == document()
