"""Bad requests: one envelope, the right status and code, the field at fault, no echo of the input, no 5xx."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from starlette.requests import Request

from server.engine_client import EngineState
from server.limits import Limits
from server.settings import ServerSettings
from tests.api.harness import SETTINGS, api, fake, saying

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]

BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": None}, "prompt", "invalid_value"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [True]}, "prompt", "invalid_value"),
    ({"prompt": [1.5]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [8192]}, "prompt", "invalid_value"),
    ({"prompt": [2**80]}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
    ({"prompt": ["x"] * 1025}, "prompt", "invalid_value"),
    ({"prompt": ["x"] * 100, "n": 100}, "n", "invalid_value"),
    ({"prompt": "x", "model": ""}, "model", "model_not_found"),
    ({"prompt": "x", "model": "nope"}, "model", "model_not_found"),
    ({"prompt": "x", "model": 5}, "model", "invalid_value"),
    ({"prompt": "x", "temperature": -1}, "temperature", "invalid_value"),
    ({"prompt": "x", "temperature": "1"}, "temperature", "invalid_value"),
    ({"prompt": "x", "temperature": True}, "temperature", "invalid_value"),
    ({"prompt": "x", "temperature": [1]}, "temperature", "invalid_value"),
    ({"prompt": "x", "top_p": 0}, "top_p", "invalid_value"),
    ({"prompt": "x", "top_p": 1.01}, "top_p", "invalid_value"),
    ({"prompt": "x", "top_k": 1.5}, "top_k", "invalid_value"),
    ({"prompt": "x", "top_k": -2}, "top_k", "invalid_value"),
    ({"prompt": "x", "min_p": 2}, "min_p", "invalid_value"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"prompt": "x", "frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "max_tokens": 5.0}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "max_tokens": 2**80}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "max_tokens": 5000}, "prompt", "context_length_exceeded"),
    ({"prompt": "x " * 2000}, "prompt", "context_length_exceeded"),
    ({"prompt": "x" * 1_000_000}, "prompt", "context_length_exceeded"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens", "invalid_value"),
    ({"prompt": "x", "n": 0}, "n", "invalid_value"),
    ({"prompt": "x", "n": 129}, "n", "invalid_value"),
    ({"prompt": "x", "n": 10**9}, "n", "invalid_value"),
    ({"prompt": "x", "seed": 2**64}, "seed", "invalid_value"),
    ({"prompt": "x", "seed": "7"}, "seed", "invalid_value"),
    ({"prompt": "x", "stop": ""}, "stop.0", "invalid_value"),
    ({"prompt": "x", "stop": ["a", ""]}, "stop.1", "invalid_value"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"prompt": "x", "stop": 5}, "stop", "invalid_value"),
    ({"prompt": "x", "stop_token_ids": [9000]}, "stop_token_ids", "invalid_value"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
    ({"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"prompt": "x", "logit_bias": {"9000": 1}}, "logit_bias", "invalid_value"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"prompt": "x", "logit_bias": {"5": "x"}}, "logit_bias.5", "invalid_value"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value"),
    ({"prompt": "x", "logprobs": -1}, "logprobs", "invalid_value"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "invalid_value"),
    ({"prompt": "x", "stream": 1}, "stream", "invalid_value"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"prompt": "x", "stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "unknown_parameter"),
    ({"prompt": "x", "speculation": 1}, "speculation", "invalid_value"),
    ({"prompt": "x", "speculation": "on"}, "speculation", "invalid_value"),
    ({"prompt": "x", "speculation": {"max_node": 1}}, "speculation.max_node", "unknown_parameter"),
    ({"prompt": "x", "speculation": {"max_nodes": 64}}, "speculation.max_nodes", "invalid_value"),
    ({"prompt": "x", "speculation": {"max_depth": -1}}, "speculation.max_depth", "invalid_value"),
    ({"prompt": "x", "speculation": {"max_depth": True}}, "speculation.max_depth", "invalid_value"),
    ({"prompt": "x", "speculation": {"drafters": ["eagle"]}}, "speculation.drafters", "invalid_value"),
    ({"prompt": "x", "speculation": {"drafters": "ngram"}}, "speculation.drafters", "invalid_value"),
    *(
        ({"prompt": "x", "speculation": {"acceptance": value}}, f"speculation.acceptance{place}", code)
        for value, place, code in (
            ("typical", "", "invalid_value"),
            ({}, ".rule", "missing_required_parameter"),
            ({"rule": 5}, ".rule", "invalid_value"),
            ({"rule": "typcial"}, ".rule", "invalid_value"),
            ({"rule": "exact", "epsilon": 0.2}, ".epsilon", "invalid_value"),
            ({"rule": "typical", "epsilon": 0}, ".epsilon", "invalid_value"),
            ({"rule": "typical", "epsilon": "0.1"}, ".epsilon", "invalid_value"),
            ({"rule": "typical", "delta": 1.5}, ".delta", "invalid_value"),
            ({"rule": "typical", "bonus": "greedy"}, ".bonus", "invalid_value"),
            ({"rule": "typical", "alpha": 0.3}, ".alpha", "unknown_parameter"),
        )
    ),
    ({"prompt": "x", "speculation": {"coupling": 1}}, "speculation.coupling", "invalid_value"),
    ({"prompt": "x", "suffix": 5}, "suffix", "invalid_value"),
    ({"prompt": "x", "best_of": 0}, "best_of", "invalid_value"),
    ({"prompt": "x", "best_of": True}, "best_of", "invalid_value"),
    ({"prompt": "x", "use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ({"prompt": "x", "guided_json": 5}, "guided_json", "invalid_value"),
    ({"prompt": "x", "temprature": 1}, "temprature", "unknown_parameter"),
    ({"prompt": "x", "messages": HELLO}, "messages", "unknown_parameter"),
]

BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_value"),
    ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages.0.foo", "unknown_parameter"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"messages": HELLO, "logprobs": 1}, "logprobs", "invalid_value"),
    ({"messages": HELLO, "max_tokens": 5000}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x " * 3000}]}, "messages", "context_length_exceeded"),
    ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    ({"messages": HELLO, "functions": [{}]}, "functions", "unsupported_parameter"),
    ({"messages": HELLO, "tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"messages": HELLO, "response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
    ({"messages": HELLO, "modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"messages": HELLO, "audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"messages": HELLO, "web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"messages": HELLO, "chat_template": "x"}, "chat_template", "unsupported_parameter"),
    (
        {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs.tokenize",
        "unknown_parameter",
    ),
    ({"messages": HELLO, "prompt": "x"}, "prompt", "unknown_parameter"),
]


def check_error(response: Any, status: int, code: str, param: str | None) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert 10 < len(error["message"]) <= 1000
    message: str = error["message"]
    return message


@pytest.mark.parametrize(("body", "param", "code"), BAD_COMPLETIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_completions(body: dict[str, Any], param: str, code: str, stream: bool) -> None:
    engine = fake()
    with api(engine) as client:
        response = client.post(
            COMPLETIONS, json={"stream": True, **body} if stream and "stream_options" not in body else body
        )
    check_error(response, 404 if code == "model_not_found" else 400, code, param)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert engine.requests == []


@pytest.mark.parametrize(("body", "param", "code"), BAD_CHATS)
def test_bad_chats(body: dict[str, Any], param: str, code: str) -> None:
    with api() as client:
        check_error(client.post(CHAT, json=body), 400, code, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"nope",
        b"[1, 2]",
        b'"x"',
        b"null",
        b'{"prompt": "x"',
        b'{"prompt": "x"} trailing',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with api() as client:
        for url in (COMPLETIONS, CHAT):
            response = client.post(url, content=body, headers={"content-type": "application/json"})
            check_error(response, 400, "invalid_json", None)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_are_not_finite_are_refused_by_name(number: str) -> None:
    with api() as client:
        for body, param in (
            ('{"prompt": "x", "temperature": %s}', "temperature"),
            ('{"prompt": "x", "logit_bias": {"5": %s}}', "logit_bias.5"),
            ('{"prompt": "x", "max_tokens": %s}', "max_tokens"),
        ):
            headers = {"content-type": "application/json"}
            response = client.post(COMPLETIONS, content=body % number, headers=headers)
            check_error(response, 400, "invalid_value", param)


@pytest.mark.parametrize(
    ("url", "body", "message"),
    [
        (COMPLETIONS, {"temperature": "hot"}, "temperature: it must be a number."),
        (COMPLETIONS, {"stream": "yes"}, "stream: it must be true or false."),
        (COMPLETIONS, {"seed": 2**80}, "seed: it must be at most 18446744073709551615."),
        (COMPLETIONS, {"seed": -(2**80)}, "seed: it must be at least -9223372036854775808."),
        (COMPLETIONS, {"model": 3}, "model: it must be a string."),
        (COMPLETIONS, {"model": "x" * 300}, "model: it can have at most 256 characters."),
        (COMPLETIONS, {"logit_bias": [5]}, "logit_bias: it must be an object."),
        (COMPLETIONS, {"stop": 5}, "stop: it must be a string or an array of strings."),
        (COMPLETIONS, {"stop": ["a", ""]}, "stop.1: it must not be empty."),
        (COMPLETIONS, {"stop": ["a"] * 100}, "stop: it can have at most 16 items."),
        (COMPLETIONS, {"stream_options": True, "stream": True}, "stream_options: it must be an object."),
        (COMPLETIONS, {"speculation": {"drafters": "ngram"}}, "speculation.drafters: it must be an array."),
        (
            COMPLETIONS,
            {"speculation": {"acceptance": {"rule": "typcial"}}},
            "speculation.acceptance.rule cannot be 'typcial': did you mean 'typical'? (there are: exact, typical).",
        ),
        (
            CHAT,
            {"speculation": {"acceptance": {"rule": "typical", "delta": -1}}},
            "speculation.acceptance.delta must be in (0, 1], not -1.",
        ),
        (COMPLETIONS, {"max_tokens": 2**40}, "max_tokens must be in [1, 2147483648], not 1099511627776."),
        (COMPLETIONS, {"max_tokens": 2, "min_tokens": 5}, "min_tokens must be at most max_tokens (2), not 5."),
        (CHAT, {"messages": []}, "messages: it must not be empty."),
        (CHAT, {"messages": [None]}, "messages.0: it must be an object."),
        (
            CHAT,
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages.0.role: it must be 'system', 'developer', 'user', 'assistant' or 'tool'.",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: it must be a string or an array of text parts.",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1] * 513}]},
            "messages.0.tool_calls: it can have at most 512 items.",
        ),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens must be in [1, 2147483648], not 0."),
    ],
)
def test_messages_are_in_the_words_of_json(url: str, body: dict[str, Any], message: str) -> None:
    whole = {"prompt": "x", **body} if url == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}], **body}
    with api() as client:
        response = client.post(url, json=whole)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
    assert message.startswith(response.json()["error"]["param"])


@pytest.mark.parametrize("value", ["off", 1, [], 0.5])
def test_speculation_of_another_form_is_shown_the_right_one(value: Any) -> None:
    with api() as client:
        response = client.post(COMPLETIONS, json={"prompt": "x", "speculation": value})
    check_error(response, 400, "invalid_value", "speculation")
    shown = 'such as {"drafters": ["ngram"], "max_nodes": 8}.'
    assert response.json()["error"]["message"].endswith(shown)


def test_a_compressed_body_is_refused_by_name() -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    with api() as client:
        response = client.post(COMPLETIONS, content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
    check_error(response, 415, "unsupported_media_type", None)
    assert "Content-Encoding" in response.json()["error"]["message"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_media_types(media_type: str) -> None:
    with api() as client:
        response = client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": media_type})
    check_error(response, 415, "unsupported_media_type", None)


def test_a_charset_is_no_other_media_type() -> None:
    with api(saying("y")) as client:
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers).status_code == 200


def test_body_limit() -> None:
    with api(settings=ServerSettings(("demo",), limits=Limits(max_body_size=1000))) as client:
        check_error(client.post(COMPLETIONS, json={"prompt": "x" * 1000}), 413, "content_too_large", None)
        check_error(client.post(COMPLETIONS, json={"prompt": "x" * 100_000}), 413, "content_too_large", None)
        assert client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_unknown_routes_and_methods() -> None:
    with api() as client:
        assert "/v1/completions" in check_error(client.post("/v1/completion"), 404, "not_found", None)
        check_error(client.get("/" + "x" * 5000), 404, "not_found", None)
        check_error(client.get("/v1/models/"), 404, "model_not_found", "model")
        response = client.get(COMPLETIONS)
        check_error(response, 405, "method_not_allowed", None)
        assert response.headers["allow"] == "POST"


def test_messages_name_the_nearest_and_never_echo_much() -> None:
    with api() as client:
        typo = client.post(COMPLETIONS, json={"prompt": "x", "temprature": 1}).json()["error"]["message"]
        long = client.post(COMPLETIONS, json={"prompt": "x", "y" * 50_000: 1}).json()["error"]
        secret = client.post(COMPLETIONS, json={"prompt": {"k": "hunter2"}, "stop": ["hunter2"] * 99}).text
        many = client.post(COMPLETIONS, json={"prompt": [["x"]] * 1000, "stop": [""] * 16})
    assert "did you mean 'temperature'" in typo
    assert len(long["message"]) <= 1000
    assert len(long["param"]) < 100
    assert "hunter2" not in secret
    assert len(many.content) < 2000


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "verbosity": "low"},
        {"best_of": 1, "suffix": None, "use_beam_search": False, "logit_bias": None, "n": None, "stop": None},
        {"seed": -(2**63), "top_k": -1, "logit_bias": {"5": -100}, "stop": ["a"] * 16},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
    ],
)
def test_fields_that_ask_for_nothing_else_are_fine(extra: dict[str, Any]) -> None:
    with api(saying("y")) as client:
        assert client.post(COMPLETIONS, json={"prompt": "x", **extra}).status_code == 200


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("loading", "server_is_overloaded"),
        ("restarting", "server_is_overloaded"),
        ("draining", "draining"),
        ("dead", "engine_dead"),
    ],
)
def test_no_engine_is_a_503_that_can_be_retried(state: EngineState, code: str) -> None:
    engine = fake()
    engine.state = state
    with api(engine) as client:
        for response in (client.post(COMPLETIONS, json={"prompt": "x"}), client.post(CHAT, json={"messages": HELLO})):
            check_error(response, 503, code, None)
            assert response.headers["retry-after"] == "2"
        health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, state)


def test_a_mistake_in_the_server_gives_nothing_away() -> None:
    def broken(request: Any) -> Any:
        raise ZeroDivisionError("secret path /home/x")

    with api(broken) as client:
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
            response = client.post(COMPLETIONS, json=body)
            assert "secret" not in check_error(response, 500, "internal_error", None)
            assert response.headers["x-should-retry"] == "false"


def test_admission_can_refuse_any_request() -> None:
    from contextlib import nullcontext

    from starlette.testclient import TestClient

    from decoding.errors import RequestError
    from server.admission import Room, Ticket
    from server.app import build_app
    from tests.api.harness import tokenizer

    class NoChat:
        def admit(self, scope: Any) -> Any:
            if Request(scope).scope["path"] == CHAT:
                raise RequestError("No chat today.", code="not_found")
            return nullcontext(Ticket(Room(1, 1)))

    client = TestClient(build_app(fake(), tokenizer(), SETTINGS, NoChat()))
    check_error(client.post(CHAT, json={"messages": HELLO}), 404, "not_found", None)
    assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
