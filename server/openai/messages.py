"""The messages of a conversation, as chat clients send them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from decoding.errors import RequestError
from server.openai.fields import MAX_TEXT_PARTS, Fields, Name, TextPart, as_parts
from server.openai.tools.fields import MAX_CALLS, CallId, ToolCall

Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_TEXT_PARTS)]
Content = Annotated[Parts, BeforeValidator(as_parts, json_schema_input_type=str | Parts)]


class Message(Fields):
    """One message. Its text may come as a string or in text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: None = None
    annotations: Any = None  # of an earlier answer, sent back; they say nothing to a model
    parsed: Any = None  # likewise, by the official client

    def check(self, place: str) -> None:
        """Check what no single field shows; ``place`` is where the message stands in the request.

        Raises:
            RequestError: a field that this role must have is missing, or has one that it cannot have.
        """
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise self._missing("content", place)
        if self.role == "tool" and self.tool_call_id is None:
            raise self._missing("tool_call_id", place)
        theirs = {"tool_call_id": "tool", "tool_calls": "assistant", "reasoning_content": "assistant"}
        theirs["reasoning"] = "assistant"
        for name, role in theirs.items():
            if getattr(self, name) and self.role != role:
                message = f"{place}.{name}: only messages of the role {role!r} can have it."
                raise RequestError(message, param=f"{place}.{name}")

    def for_template(self, template_id: Callable[[str], str]) -> dict[str, Any]:
        """The message as chat templates know it; "developer" is OpenAI's newer word for "system".

        Args:
            template_id: makes a call's id one that the template takes.
        """
        role = "system" if self.role == "developer" else self.role
        # of a message that only calls, too: many templates look into the content without asking whether there is one
        told: dict[str, Any] = {"role": role, "content": "\n".join(part.text for part in self.content or ())}
        if self.name is not None:
            told["name"] = self.name
        if self.reasoning_content or self.reasoning:
            told["reasoning_content"] = self.reasoning_content or self.reasoning
        if self.tool_calls:
            told["tool_calls"] = [
                {"id": template_id(call.id), "type": "function", "function": call.function.for_template()}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            told["tool_call_id"] = template_id(self.tool_call_id)
        return told

    def _missing(self, name: str, place: str) -> RequestError:
        if name in self.model_fields_set:
            return RequestError(
                f"{place}.{name}: messages of the role {self.role!r} must have it.", param=f"{place}.{name}"
            )
        code = "missing_required_parameter"
        return RequestError(f"The field {place}.{name} is missing.", param=f"{place}.{name}", code=code)
