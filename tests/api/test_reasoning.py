"""Reasoning in /v1/chat/completions: fields of its own, and tokens that are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from decoding.request import Reasoning
from server.app import build_app
from server.fake_client import FakeEngineClient
from server.settings import ServerSettings
from tests.api.families import CALL, HERMES, THINKING, TOOLS, special_tokenizer
from tests.api.harness import INFO, SETTINGS, api, events, fake, saying, tokenizer

URL = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "2 + 2?"}]}
STEPS = ("Two and", " two.\n</th", "ink>\n\nFour", ".")


def whole(*said: str, template: str = THINKING, reason: str = "stop", **body: Any) -> dict[str, Any]:
    with api(saying(*said, reason=reason), template=template) as client:
        response = client.post(URL, json={**ASK, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def reasoning_tokens(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    return count


def test_reasoning_has_fields_of_its_own() -> None:
    answer = whole(*STEPS)
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Four.",
        "refusal": None,
        "reasoning_content": "Two and two.",
        "reasoning": "Two and two.",
    }


def test_its_tokens_are_counted_up_to_the_closing_tag() -> None:
    text = tokenizer()
    steps = [text.encode(step) for step in STEPS]
    said = ""
    inside = 0
    for token in (token for step in steps for token in step):
        if "</think>" not in said:
            inside += 1
        said += text.token_text(token)
    answer = whole(*STEPS)
    assert reasoning_tokens(answer) == inside
    assert answer["usage"]["completion_tokens"] == sum(map(len, steps)) + 1
    cut = whole("Two and two", reason="length")
    assert reasoning_tokens(cut) == cut["usage"]["completion_tokens"]
    assert (
        reasoning_tokens(
            whole("Four.", template=HERMES.replace("<|im_start|>assistant\n{% e", "<think>\n</think>{% e"))
        )
        == 0
    )


def test_a_stream_tells_the_parts_in_their_fields() -> None:
    with api(saying(*STEPS, reason="stop"), template=THINKING) as client:
        options = {"include_usage": True}
        *chunks, last = events(client.post(URL, json={**ASK, "stream": True, "stream_options": options}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Two and", "reasoning": "Two and"},
        {"reasoning_content": " two.", "reasoning": " two."},
        {"content": "Four"},
        {"content": "."},
        {},
    ]
    assert reasoning_tokens(last) == reasoning_tokens(whole(*STEPS))


def test_calls_come_behind_reasoning() -> None:
    message = whole("Hm.</think>\n\n", f"<tool_call>{CALL}</tool_call>", tools=TOOLS)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", None)
    assert len(message["tool_calls"]) == 1
    thought = f"<tool_call>{CALL}</tool_call>"
    message = whole(thought, "</think>ok", tools=TOOLS)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (thought, "ok")


def test_reasoning_goes_back_into_the_template() -> None:
    engine = fake(saying("x"))
    for name in ("reasoning", "reasoning_content"):
        with api(engine, template=HERMES) as client:
            turn = {"role": "assistant", "content": "Four.", name: "Two and two."}
            assert client.post(URL, json={"messages": [turn]}).status_code == 200
        said = tokenizer().decode(engine.requests[-1].prompt_ids, skip_special_tokens=False)
        assert "<think>\nTwo and two.\n</think>\n\nFour." in said


@pytest.mark.parametrize("setting", ["none", "mistral"])
def test_the_format_can_be_set(setting: str) -> None:
    with api(saying(*STEPS), ServerSettings(("demo",), reasoning_parser=setting), THINKING) as client:
        message = client.post(URL, json=ASK).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "".join(STEPS), "refusal": None}


NAMED = {"type": "function", "function": {"name": "time"}}
CLOSED = HERMES.replace("<|im_start|>assistant\n{% e", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% e")
HELD: dict[str, dict[str, Any]] = {
    "a form": {"response_format": {"type": "json_object"}},
    "choices": {"guided_choice": ["yes", "no"]},
    "a call": {"tools": TOOLS, "tool_choice": NAMED},
}


def test_without_tokens_for_the_tags_an_output_that_is_held_to_calls_has_no_reasoning() -> None:
    message = whole("{}", tools=TOOLS, tool_choice=NAMED)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "time"


@pytest.mark.parametrize("held", list(HELD))
@pytest.mark.parametrize("template", [THINKING, HERMES, CLOSED], ids=["inside", "before", "behind"])
def test_an_output_that_is_held_to_a_form_is_so_behind_its_reasoning(template: str, held: str, tmp_path: Path) -> None:
    text = special_tokenizer(tmp_path, template, "<think>", "</think>")
    tags = {tag: text.encode(tag)[0] for tag in ("<think>", "</think>")}
    thought = {THINKING: "Hm.</think>", HERMES: "<think>Hm.</think>", CLOSED: ""}[template]
    said = text.encode(thought + "{}")
    engine = FakeEngineClient(replace(INFO, vocab_size=text.vocab_size), saying(said))
    client = TestClient(build_app(engine, text, SETTINGS))
    answer = client.post(URL, json={**ASK, **HELD[held]}).json()
    expected = {
        THINKING: Reasoning(tags["</think>"]),
        HERMES: Reasoning(tags["</think>"], tags["<think>"]),
        CLOSED: None,
    }
    assert engine.requests[-1].reasoning == expected[template]
    assert engine.requests[-1].grammar is not None
    message = answer["choices"][0]["message"]
    assert message.get("reasoning_content") == ("Hm." if thought else None)
    if held == "a call":
        assert message["tool_calls"][0]["function"]["arguments"] == "{}"
    else:
        assert message["content"] == "{}"
    if thought:
        assert reasoning_tokens(answer) == len(text.encode(thought))


def test_responses_think_before_their_form_too(tmp_path: Path) -> None:
    text = special_tokenizer(tmp_path, THINKING, "<think>", "</think>")
    engine = FakeEngineClient(replace(INFO, vocab_size=text.vocab_size), saying(text.encode("Hm.</think>{}")))
    client = TestClient(build_app(engine, text, SETTINGS))
    body = {"input": "2 + 2?", "text": {"format": {"type": "json_object"}}}
    thought, message = client.post("/v1/responses", json=body).json()["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "{}"
    assert engine.requests[-1].reasoning == Reasoning(text.encode("</think>")[0])


def test_a_request_that_is_held_to_nothing_is_read_as_before(tmp_path: Path) -> None:
    text = special_tokenizer(tmp_path, THINKING, "<think>", "</think>")
    engine = FakeEngineClient(replace(INFO, vocab_size=text.vocab_size), saying(text.encode("Hm.</think>Yes.")))
    client = TestClient(build_app(engine, text, SETTINGS))
    message = client.post(URL, json=ASK).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    assert engine.requests[-1].reasoning is None
