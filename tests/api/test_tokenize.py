"""/tokenize, /detokenize, /version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from tests.api.harness import INFO, api, ids, tokenizer

HELLO = [{"role": "user", "content": "import os"}]


def test_a_text_s_tokens() -> None:
    with api() as client:
        body = client.post("/tokenize", json={"model": "demo", "prompt": "return n", "return_token_strs": True}).json()
    assert body == {
        "count": 2,
        "max_model_len": INFO.max_model_len,
        "tokens": list(ids("return n")),
        "token_strs": ["return", "Ġn"],
    }


def test_a_conversation_s_tokens_are_those_of_the_chat_endpoint() -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    with api(template=template) as client:
        for extra, text in (({}, "<import os>!"), ({"add_generation_prompt": False}, "<import os>")):
            body = client.post("/tokenize", json={"messages": HELLO, **extra}).json()
            assert (body["tokens"], body["token_strs"]) == (list(ids(text)), None)
        continued = client.post("/tokenize", json={"messages": HELLO, "continue_final_message": True}).json()
    assert continued["tokens"] == list(ids("<import os"))


def test_tokens_become_text_again_special_ones_included() -> None:
    text = "<|im_start|>naïve 漢字\n"
    with api() as client:
        tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
        assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_text_longer_than_the_context_is_counted() -> None:
    text = "return n\n" * 2000
    with api() as client:
        body = client.post("/tokenize", json={"prompt": text}).json()
    assert body["count"] == len(tokenizer().encode(text)) > INFO.max_model_len


@pytest.mark.parametrize(
    ("url", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "invalid_value"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", "unknown_parameter"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "invalid_value"),
        ("/tokenize", {"prompt": "x" * 2_000_000}, "prompt", "context_length_exceeded"),
        ("/tokenize", {"messages": []}, "messages", "invalid_value"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x" * 2_000_000}]},
            "messages",
            "context_length_exceeded",
        ),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, "chat_template", "unsupported_parameter"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": "x"}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [8192]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0", "invalid_value"),
    ],
)
def test_what_cannot_be(url: str, body: dict[str, Any], param: str, code: str) -> None:
    with api() as client:
        response = client.post(url, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


@pytest.mark.parametrize("url", ["/tokenize", "/detokenize"])
def test_another_model(url: str) -> None:
    with api() as client:
        response = client.post(
            url, json={"model": "nope", "prompt": "a"} if url == "/tokenize" else {"model": "nope", "tokens": []}
        )
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_version() -> None:
    with api() as client:
        assert client.get("/version").json() == {"version": version("saccade")}
