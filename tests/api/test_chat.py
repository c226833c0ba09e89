"""/v1/chat/completions: exact shapes, templates, logprobs, streams."""

from __future__ import annotations

import pytest

from tests.api.harness import INFO, api, events, fake, ids, saying, tokenizer

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "import os"}]


def test_whole_answer_has_exactly_openais_fields_and_ours() -> None:
    with api(saying("print", "()", reason="stop")) as client:
        body = client.post(URL, json={"model": "alias", "messages": HELLO, "seed": 9}).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    prompt = len(tokenizer().apply_chat_template(HELLO))
    usage = body.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, 3)
    assert usage["total_tokens"] == prompt + 3
    message = {"role": "assistant", "content": "print()", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body == {"object": "chat.completion", "model": "alias", "seed": 9, "choices": [choice]}


def test_stream_says_role_then_content_then_reason() -> None:
    with api(saying("print", "()", reason="stop")) as client:
        chunks = events(client.post(URL, json={"messages": HELLO, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "print"},
        {"content": "()"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


def test_each_choice_of_a_stream_has_its_own_role_and_reason() -> None:
    with api(saying("a", "b")) as client:
        chunks = events(client.post(URL, json={"messages": HELLO, "stream": True, "n": 2}))
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in own[:1]] == [{"role": "assistant", "content": ""}]
        assert [choice["finish_reason"] for choice in own] == [None, None, None, "length"]


def test_stream_usage() -> None:
    with api(saying("a", "b")) as client:
        options = {"include_usage": True}
        *chunks, last = events(client.post(URL, json={"messages": HELLO, "stream": True, "stream_options": options}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)


def test_max_tokens_is_the_rest_of_the_context_by_default() -> None:
    engine = fake(saying("a"))
    with api(engine) as client:
        client.post(URL, json={"messages": HELLO})
        client.post(URL, json={"messages": HELLO, "max_tokens": 5})
        client.post(URL, json={"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6})
    rest = INFO.max_model_len - len(tokenizer().apply_chat_template(HELLO))
    assert [request.params.max_tokens for request in engine.requests] == [rest, 5, 6]


def test_logprobs_of_the_content() -> None:
    with api(saying("a b")) as client:
        (choice,) = client.post(URL, json={"messages": HELLO, "logprobs": True, "top_logprobs": 2}).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["a", " b"]
    assert [entry["bytes"] for entry in entries] == [[97], [32, 98]]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert choice["logprobs"]["refusal"] is None


def test_streamed_logprobs_are_those_of_the_whole_answer() -> None:
    with api(saying("a", " b c", " d")) as client:
        ask = {"messages": HELLO, "logprobs": True, "top_logprobs": 1}
        (choice,) = client.post(URL, json=ask).json()["choices"]
        chunks = events(client.post(URL, json={**ask, "stream": True}))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == choice["logprobs"]["content"]


def test_text_parts_and_the_developer_role_reach_the_template() -> None:
    engine = fake(saying("a"))
    parts = [{"type": "text", "text": "x = 1"}, {"type": "text", "text": "y = 2"}]
    with api(engine) as client:
        client.post(
            URL, json={"messages": [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]}
        )
    same = [{"role": "system", "content": "be"}, {"role": "user", "content": "x = 1\ny = 2"}]
    assert engine.requests[0].prompt_ids == tuple(tokenizer().apply_chat_template(same))


def test_another_template_can_be_served() -> None:
    engine = fake(saying("a"))
    with api(engine, template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}") as client:
        client.post(URL, json={"messages": HELLO})
    assert engine.requests[0].prompt_ids == ids("<user>import os")


def test_a_template_that_refuses_is_the_clients_mistake() -> None:
    with api(template="{{ raise_exception('roles must alternate') }}") as client:
        response = client.post(URL, json={"messages": HELLO})
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused(kind: str) -> None:
    with api() as client:
        message = {"role": "user", "content": [{"type": kind, kind: {"url": "http://localhost/x"}}]}
        response = client.post(URL, json={"messages": [message]})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("unsupported_value", "messages.0.content.0.type")
