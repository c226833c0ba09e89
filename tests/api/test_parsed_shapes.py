"""Answers with reasoning and tool calls, and those of /v1/responses, have the shapes that /openapi.json shows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from decoding.messages import DrafterStats, SpeculationStats, TokenEvent
from decoding.request import GenerateRequest
from server.fake_client import Death, Line
from tests.api.families import CALL, THINKING, TOOLS
from tests.api.harness import api, events, ids, saying
from tests.api.test_openapi import content, faults

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
STATS = SpeculationStats(4, 10, 6, {"prediction": DrafterStats(8, 5)})
SAID = ("Hm", ".\n</think>\n\n", "Rain. ", f"<tool_call>{CALL}", "</tool_call>")
MESSAGES = [{"role": "user", "content": "x"}]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
SCORED = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
PREDICTED = {"prediction": {"type": "content", "content": "y"}}

REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES, "tools": TOOLS, "n": 2, "logprobs": True, **PREDICTED}),
    (CHAT, {"messages": MESSAGES, "tools": TOOLS, "return_token_ids": True}),
    (RESPONSES, {"input": "x"}),
    (RESPONSES, {"input": "x", "tools": FLAT, "tool_choice": "auto", **SCORED, **PREDICTED}),
    (RESPONSES, {"input": "x", "reasoning": {"summary": "auto"}, "text": {"verbosity": "low"}, "metadata": {"a": "b"}}),
]


def sent(response: Any, path: str) -> list[Any]:
    if path == CHAT:
        return events(response)
    frames = response.text.removesuffix("\n\n").split("\n\n")
    return [json.loads(frame.partition("\ndata: ")[2]) for frame in frames]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_whole_answers(path: str, body: dict[str, Any], reason: str) -> None:
    with api(saying(*SAID, reason=reason, stats=STATS), template=THINKING) as client:
        response = client.post(path, json=body)
    assert response.status_code == 200
    assert faults(content(response, path), response.json()) == []


@pytest.mark.parametrize(("path", "body"), REQUESTS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_streams(path: str, body: dict[str, Any], reason: str) -> None:
    with api(saying(*SAID, reason=reason, stats=STATS), template=THINKING) as client:
        response = client.post(path, json={**body, "stream": True})
    told = sent(response, path)
    schema = content(response, path)["x-event"]
    assert len(told) > 5
    assert [faults(schema, event) for event in told] == [[]] * len(told)


def test_a_response_that_fails_on_the_way() -> None:
    def dying(request: GenerateRequest) -> Iterable[Line]:
        yield TokenEvent(request.request_id, 0, ids("a"))
        yield Death()

    with api(dying) as client:
        response = client.post(RESPONSES, json={"input": "x", "stream": True})
    told = sent(response, RESPONSES)
    schema = content(response, RESPONSES)["x-event"]
    assert [event["type"] for event in told[-2:]] == ["response.failed", "error"]
    assert [faults(schema, event) for event in told] == [[]] * len(told)
