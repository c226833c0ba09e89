"""Every request field of the official client's types is honoured, or refused by a 400 that names it."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from tests.api.asking import ASK, CHAT, COMPLETIONS
from tests.api.harness import api, saying

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"name": "s", "schema": {"type": "object"}}

# one value of each field that asks for something, as the client's own types have it
BOTH: dict[str, Any] = {
    "model": "demo",
    "frequency_penalty": 0.5,
    "logit_bias": {"50": -5},
    "max_tokens": 5,
    "n": 2,
    "presence_penalty": -0.5,
    "seed": 7,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "u",
}
VALUES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {**BOTH, "prompt": "x", "best_of": 2, "echo": True, "logprobs": 3, "suffix": "y"},
    CHAT: {
        **BOTH,
        "messages": ASK[CHAT]["messages"],
        "audio": {"format": "wav", "voice": "alloy"},
        "function_call": {"name": "f"},
        "functions": [{"name": "f"}],
        "logprobs": True,
        "max_completion_tokens": 5,
        "metadata": {"a": "b"},
        "modalities": ["text", "audio"],
        "moderation": {"model": "m"},
        "parallel_tool_calls": False,
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "reasoning_effort": "high",
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        "safety_identifier": "s",
        "service_tier": "flex",
        "store": True,
        "tool_choice": "required",
        "tools": [TOOL],
        "top_logprobs": 2,
        "verbosity": "high",
        "web_search_options": {"search_context_size": "low"},
    },
}
NEEDED = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}, "tool_choice": {"tools": [TOOL]}}
REFUSED: dict[str, set[str]] = {
    CHAT: {"audio", "modalities", "moderation", "reasoning_effort", "web_search_options"},
    COMPLETIONS: set(),
}
# by what the server was started with
MAY_BE_REFUSED = {"function_call", "functions", "parallel_tool_calls", "response_format", "tool_choice", "tools"}


def official(module: Any) -> set[str]:
    forms = module.CompletionCreateParamsNonStreaming, module.CompletionCreateParamsStreaming
    return {
        name for form in forms for name in (*form.__annotations__, *module.CompletionCreateParamsBase.__annotations__)
    }


@pytest.mark.parametrize(("url", "module"), [(COMPLETIONS, completion_create_params), (CHAT, chat_create_params)])
def test_every_field_of_the_client_s_types_is_tried_here(url: str, module: Any) -> None:
    assert official(module) <= set(VALUES[url])


@pytest.mark.parametrize(("url", "name"), [(url, name) for url, values in VALUES.items() for name in values])
def test_a_field_is_honoured_or_named(url: str, name: str) -> None:
    with api(saying("y")) as client:
        response = client.post(url, json={**ASK[url], **NEEDED.get(name, {}), name: VALUES[url][name]})
    if name in MAY_BE_REFUSED and response.status_code == 200:
        return
    if name not in REFUSED[url] | MAY_BE_REFUSED:
        assert response.status_code == 200, response.text
        return
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] in {name, *NEEDED.get(name, {})}
