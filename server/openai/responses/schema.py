"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from decoding.errors import RequestError
from server.openai.fields import DrawFields, Fields, Integer, Name
from server.openai.responses.items import Item, as_items
from server.openai.tools.fields import MAX_TOOLS, FunctionName

MAX_ITEMS = 4096
LOGPROBS = "message.output_text.logprobs"
Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class FlatTool(Fields):
    """A function, with its fields beside its type."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Fields):
    type: Literal["function"]
    name: FunctionName


class FlatAllowed(Fields):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatChoice], Field(min_length=1, max_length=MAX_TOOLS)]


def _choice_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "choice_word"
    if isinstance(value, dict):
        return "choice_allowed" if value.get("type") == "allowed_tools" else "choice_function"
    return {"function": "choice_function", "allowed_tools": "choice_allowed"}.get(getattr(value, "type", ""))


FlatToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("choice_word")]
    | Annotated[FlatChoice, Tag("choice_function")]
    | Annotated[FlatAllowed, Tag("choice_allowed")],
    Discriminator(
        _choice_form,
        custom_error_type="tool_choice_form",
        custom_error_message='it must be "none", "auto", "required", or an object such as '
        '{"type": "function", "name": "..."}',
    ),
]


class TextFormat(Fields):
    """What the text must be; the members beside ``type`` are those of "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextFields(Fields):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningFields(Fields):
    """``summary`` asks for less than what comes: all of the reasoning."""

    effort: Name | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(Fields):
    include_usage: bool | None = None  # chat's, which AIPerf sends here too; a completed response always has its usage
    include_obfuscation: bool | None = None  # padding against eavesdroppers; accepted and not done


Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


class ResponsesFields(DrawFields):
    """The fields of sampling are those of chat, which checks them."""

    input: Annotated[Items, BeforeValidator(as_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Integer | None = None  # of built-in tools, which there are none of
    include: Annotated[list[Include], Field(max_length=16)] | None = None
    top_logprobs: Integer | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, Name], Field(max_length=16)] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: Name | None = None
    conversation: None = None
    prompt: None = None

    def check(self) -> None:
        """Check what is asked for that only a server which keeps responses can do.

        Raises:
            RequestError: naming the field at fault.
        """
        why_not = {
            "store": "this server keeps no responses; send false, or leave it out",
            "background": "this server keeps no responses; send false, or leave it out",
            "previous_response_id": "this server keeps no responses; send the whole conversation as input",
        }
        for name, why in why_not.items():
            if getattr(self, name):
                raise RequestError(f"{name}: {why}.", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options can only be given with stream: true.", param="stream_options")
        if self.top_logprobs and not self.scored:
            raise RequestError(f'top_logprobs can only be given with include: ["{LOGPROBS}"].', param="top_logprobs")

    @property
    def scored(self) -> bool:
        """Whether the text's logprobs are asked for."""
        return LOGPROBS in (self.include or ())
