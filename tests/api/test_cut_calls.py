"""Tool calls that the limit of tokens cuts: as far as they came, in a stream as in a whole answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.families import HERMES, LLAMA, MISTRAL, TOOLS
from tests.api.harness import api, events, saying

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather in Oslo?"}]
NAMED = {"type": "function", "function": {"name": "weather"}}
WEATHER = ("weather", '{"city": "Os')

# template, tool_choice, what the model says: text, and the calls that were told of it
CUT: dict[str, tuple[str, Any, list[str], str | None, list[tuple[str, str]]]] = {
    "hermes": (HERMES, "auto", ['<tool_call>{"name": "weather", "argu', 'ments": {"city": "Os'], None, [WEATHER]),
    "llama": (LLAMA, "auto", ['{"name": "weather", "parame', 'ters": {"city": "Os'], None, [WEATHER]),
    "mistral": (MISTRAL, "auto", ["[TOOL_CALLS]weather", '{"city": "Os'], None, [WEATHER]),
    "named": (HERMES, NAMED, ['{"ci', 'ty": "Os'], None, [WEATHER]),
    "required": (
        HERMES,
        "required",
        ['[{"name": "time", "parameters": {}}, {"name": "weather", "parameters":', ' {"city": "Os'],
        None,
        [("time", "{}"), WEATHER],
    ),
    "behind a text": (
        HERMES,
        "auto",
        ["Hm. ", '<tool_call>{"name": "weather", "arguments": {"city": "Os'],
        "Hm. ",
        [WEATHER],
    ),
    "before its name": (HERMES, "auto", ['<tool_call>{"name": "wea'], '<tool_call>{"name": "wea', []),
    "before its brace": (HERMES, NAMED, ["\n"], "\n", []),
}


def asked(choice: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}


@pytest.mark.parametrize("name", CUT)
def test_a_call_that_the_limit_cuts_is_the_same_in_both_forms(name: str) -> None:
    template, choice, said, text, calls = CUT[name]
    with api(saying(*said, reason="length"), template=template) as client:
        whole = client.post(URL, json=asked(choice)).json()["choices"][0]
        chunks = events(client.post(URL, json={**asked(choice), "stream": True}))
    assert whole["finish_reason"] == "length"
    assert whole["message"]["content"] == text
    functions = [call["function"] for call in whole["message"].get("tool_calls", ())]
    assert [(each["name"], each["arguments"]) for each in functions] == calls
    assert _streamed(chunks) == (text or "", calls, "length")


def _streamed(chunks: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]], str | None]:
    text, names, arguments, reason = "", dict[int, str](), dict[int, str](), None
    for chunk in chunks:
        choice = chunk["choices"][0]
        reason = choice["finish_reason"] or reason
        text += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", ()):
            names[call["index"]] = call["function"].get("name") or names[call["index"]]
            arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
    return text, [(names[index], arguments[index]) for index in names], reason


@pytest.mark.parametrize("choice", ["auto", {"type": "function", "name": "weather"}], ids=["auto", "named"])
def test_responses_tell_of_an_incomplete_call(choice: Any) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    body = {"input": "Weather in Oslo?", "tools": tools, "tool_choice": choice}
    said = '<tool_call>{"name": "weather", "arguments": {"city": "Os' if choice == "auto" else '{"city": "Os'
    with api(saying(said, reason="length"), template=HERMES) as client:
        whole = client.post("/v1/responses", json=body).json()
        lines = client.post("/v1/responses", json={**body, "stream": True}).text.splitlines()
    last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
    assert last["type"] == "response.incomplete"
    for response in (whole, last["response"]):
        (item,) = response["output"]
        assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "incomplete")
        assert item["arguments"] == '{"city": "Os'
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
