"""A request for a response as the request for a chat completion that it comes down to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoding.errors import RequestError
from server.openai.responses.items import CallItem, CallOutputItem, Item, MessageItem, ReasoningItem, TextItemPart
from server.openai.responses.schema import FlatAllowed, FlatChoice, FlatTool, ResponsesFields, TextFormat

# fields that mean the same in chat
_SAME = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "seed", "speculation", "cache_salt"),
    *("prediction", "parallel_tool_calls", "stream"),
)
# beginnings of chat's names, and what they are called here; the first that fits counts
_RENAMED = (
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("tool_choice.allowed_tools", "tool_choice"),
    ("prompt", "input"),
)


def chat_body(body: dict[str, Any], fields: ResponsesFields) -> dict[str, Any]:
    """The body of the chat request; ``body`` is what ``fields`` were parsed from."""
    chat = {name: body[name] for name in _SAME if body.get(name) is not None}
    chat["messages"] = messages_of(fields.instructions, fields.input)
    if fields.max_output_tokens is not None:
        chat["max_completion_tokens"] = fields.max_output_tokens
    if fields.scored:
        chat |= {"logprobs": True, "top_logprobs": fields.top_logprobs or 0}
    if fields.text is not None and fields.text.format is not None:
        chat["response_format"] = _response_format(fields.text.format)
    if fields.reasoning is not None and fields.reasoning.effort is not None:
        chat["reasoning_effort"] = fields.reasoning.effort
    if fields.tools:
        chat["tools"] = [_tool(tool) for tool in fields.tools]
    if fields.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(fields.tool_choice)
    return chat


def here(error: RequestError) -> RequestError:
    """An error about the chat request, in the words of this one."""
    param, message = error.param, error.message
    if param is None:
        return error
    for theirs, ours in _RENAMED:
        if param == theirs or param.startswith(f"{theirs}."):
            renamed = ours if ours == "input" else ours + param[len(theirs) :]  # an item is no message
            return RequestError(message.replace(param, renamed), param=renamed, code=error.code)
    parts = param.split(".")
    renamed = ".".join(part for part in parts if part != "function") if parts[0] in ("tools", "tool_choice") else param
    return RequestError(message.replace(param, renamed), param=renamed, code=error.code)


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Chat messages. Items of one turn of the assistant, its reasoning, text and calls, are one message there."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None  # the assistant's, while it goes on
    for item in items:
        if isinstance(item, CallOutputItem):
            turn = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            turn = None
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            if turn is None or not _goes_on(turn, item):
                turn = {"role": "assistant"}
                messages.append(turn)
            _add_to_turn(turn, item)
    return [message for message in messages if message != {"role": "assistant"}]


def _goes_on(turn: dict[str, Any], item: MessageItem | CallItem | ReasoningItem) -> bool:
    """Whether the item is part of the same message: reasoning comes before text, and text before calls."""
    if isinstance(item, CallItem):
        return True
    later = (
        ("content", "tool_calls") if isinstance(item, MessageItem) else ("reasoning_content", "content", "tool_calls")
    )
    return not any(turn.get(name) for name in later)


def _add_to_turn(turn: dict[str, Any], item: MessageItem | CallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        turn["content"] = _text(item.content)
    elif isinstance(item, ReasoningItem):
        thought = "".join(part.text for part in item.content or ())
        if thought:
            turn["reasoning_content"] = thought
            turn.setdefault("content", "")
    else:
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(parts: Sequence[TextItemPart]) -> str:
    return "".join(part.text for part in parts)


def _tool(tool: FlatTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(choice: str | FlatChoice | FlatAllowed) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    if isinstance(choice, FlatChoice):
        return _named(choice)
    allowed = {"mode": choice.mode, "tools": [_named(each) for each in choice.tools]}
    return {"type": "allowed_tools", "allowed_tools": allowed}


def _named(choice: FlatChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(given: TextFormat) -> dict[str, Any]:
    members = given.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
    return {"type": given.type, **({"json_schema": members} if members or given.type == "json_schema" else {})}
