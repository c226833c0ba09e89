"""The items of a conversation: what clients send as ``input``, their copies of earlier answers included."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from server.openai.fields import MAX_TEXT_PARTS, Fields, Name
from server.openai.tools.fields import CallId, FunctionName

Status = Literal["in_progress", "completed", "incomplete"]


class TextItemPart(Fields):
    """Text; what else an answer's parts have says nothing to a model."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None  # added by the official client


def as_parts(value: Any) -> Any:
    """Text as a string or in parts, before it is checked: as parts."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_form", "it must be a string or an array of text parts")
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


TextItemParts = Annotated[list[TextItemPart], Field(max_length=MAX_TEXT_PARTS)]
ItemText = Annotated[TextItemParts, BeforeValidator(as_parts, json_schema_input_type=str | TextItemParts)]


class MessageItem(Fields):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemText
    id: Name | None = None
    status: Status | None = None
    phase: Name | None = None


class CallItem(Fields):
    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: Name | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None
    async_: None = None
    parsed_arguments: Any = None  # added by the official client


class CallOutputItem(Fields):
    type: Literal["function_call_output"]
    call_id: CallId
    output: ItemText
    id: Name | None = None
    status: Status | None = None
    name: Name | None = None
    namespace: None = None
    caller: None = None


class SummaryPart(Fields):
    type: Literal["summary_text"]
    text: str


class ReasoningPart(Fields):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Fields):
    type: Literal["reasoning"]
    summary: Annotated[list[SummaryPart], Field(max_length=MAX_TEXT_PARTS)]
    content: Annotated[list[ReasoningPart], Field(max_length=MAX_TEXT_PARTS)] | None = None
    encrypted_content: str | None = None
    id: Name | None = None
    status: Status | None = None


_TAGS = {
    "message": "item_message",
    "function_call": "item_call",
    "function_call_output": "item_output",
    "reasoning": "item_reasoning",
}
ITEM_TAGS = frozenset(_TAGS.values())  # they are no part of a field's place


def _item_form(value: Any) -> str | None:
    """An object without a known type is a message, whose errors say what is wrong with it."""
    if isinstance(value, dict):
        return _TAGS.get(str(value.get("type")), "item_message")
    return _TAGS.get(getattr(value, "type", ""))


Item = Annotated[
    Annotated[MessageItem, Tag("item_message")]
    | Annotated[CallItem, Tag("item_call")]
    | Annotated[CallOutputItem, Tag("item_output")]
    | Annotated[ReasoningItem, Tag("item_reasoning")],
    Discriminator(
        _item_form,
        custom_error_type="item_form",
        custom_error_message="it must be an object, its type one of: " + ", ".join(_TAGS),
    ),
]


def as_items(value: Any) -> Any:
    """The input as a string or in items, before it is checked: as items."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("input_form", "it must be a string or an array of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value
