"""Reasoning in /v1/chat/completions: fields of its own, and tokens that are counted."""

from __future__ import annotations

from typing import Any

import pytest

from server.settings import ServerSettings
from tests.api.families import CALL, HERMES, THINKING, TOOLS
from tests.api.harness import api, events, fake, saying, tokenizer

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


def test_an_output_that_is_held_to_calls_has_no_reasoning() -> None:
    named = {"type": "function", "function": {"name": "time"}}
    message = whole("{}", tools=TOOLS, tool_choice=named)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "time"
