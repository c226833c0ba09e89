"""More of the official Python client: structured output, tools, and the API of responses."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from judge import MODEL, Judge, raises
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "import os\n"}]
ASK: Any = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 200, "seed": 3}


class Pick(BaseModel):
    """Bounded on all sides: a model of 8 million parameters cannot be trusted to end a string."""

    colour: Literal["red", "green", "blue"]
    number: Literal[1, 2, 3]
    final: bool


def structured(judge: Judge, client: openai.OpenAI) -> None:
    with judge("structured output: parse()"):
        done = client.chat.completions.parse(**ASK, response_format=Pick)
        assert isinstance(done.choices[0].message.parsed, Pick)
        assert done.choices[0].finish_reason == "stop"
    with (
        judge("structured output: stream()"),
        client.chat.completions.stream(**ASK, response_format=Pick) as stream,
    ):
        assert stream.get_final_completion().choices[0].message.parsed == done.choices[0].message.parsed
    with judge("structured output: a schema that cannot be is a BadRequestError"):
        broken: Any = {"type": "json_schema", "json_schema": {"name": "broken", "schema": {"type": "nothing"}}}
        raises(openai.BadRequestError, lambda: client.chat.completions.create(**ASK, response_format=broken))


def tools(judge: Judge, client: openai.OpenAI) -> None:
    ask = {**ASK, "tools": [openai.pydantic_function_tool(Pick)]}
    ask["tool_choice"] = {"type": "function", "function": {"name": "Pick"}}
    with judge("tools: a named one is called with arguments of its schema"):
        (call,) = client.chat.completions.create(**ask).choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "Pick"
        picked = Pick.model_validate_json(call.function.arguments)
    with judge("tools: the call in a stream"):
        names, arguments = [], ""
        for chunk in client.chat.completions.create(**ask, stream=True):
            for piece in (chunk.choices[0].delta.tool_calls if chunk.choices else None) or []:
                names += [piece.function.name] if piece.function.name else []
                arguments += piece.function.arguments or ""
        assert names == ["Pick"]
        assert Pick.model_validate_json(arguments) == picked
    with judge("tools: a call and its result in the conversation"):
        said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
        result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"ok": True})}
        again = {**ask, "messages": [*MESSAGES, said, result], "tool_choice": "none"}
        assert client.chat.completions.create(**again).choices[0].message.role == "assistant"


def responses(judge: Judge, client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "input": "import os\n", "max_output_tokens": 24}
    with judge("responses: whole"):
        done = client.responses.create(**ask, temperature=0)
        assert done.output_text
        assert done.usage is not None
        assert done.usage.output_tokens > 0
    with judge("responses: stream()"), client.responses.stream(**ask, temperature=0) as stream:
        kinds = [event.type for event in stream]
        assert (kinds[0], kinds[-1]) in (
            ("response.created", "response.completed"),
            ("response.created", "response.incomplete"),
        )
        assert "response.output_text.delta" in kinds
    with judge("responses: a model that is not there is a NotFoundError"):
        raises(openai.NotFoundError, lambda: client.responses.create(**{**ask, "model": "nope"}))
