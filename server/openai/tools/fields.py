"""The request fields of tools, as chat clients send them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import Discriminator, Field, Tag

from decoding.errors import RequestError
from server.openai.fields import Fields, Integer

MAX_TOOLS = 512
MAX_TOOL_BYTES = 2**20  # of all definitions together, as JSON: templates print them into the prompt
MAX_FUNCTION_NAME_CHARS = 128
MAX_CALLS = 512  # of one message
MAX_CALL_ID_CHARS = 256

FunctionName = Annotated[str, Field(min_length=1, max_length=MAX_FUNCTION_NAME_CHARS)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID_CHARS)]


class FunctionDefinition(Fields):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # holds for calls that are forced; others are written freely

    def for_template(self) -> dict[str, Any]:
        """The definition as transformers makes it of a Python function, which is what templates expect."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"name": self.name, "description": self.description or "", "parameters": parameters}


class Tool(Fields):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionChoice(Fields):
    name: FunctionName


class NamedChoice(Fields):
    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(Fields):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Fields):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "choice_word"
    if isinstance(value, dict):
        return "choice_allowed" if value.get("type") == "allowed_tools" else "choice_function"
    return {"function": "choice_function", "allowed_tools": "choice_allowed"}.get(getattr(value, "type", ""))


# tags of the union below, which are no part of a field's place
CHOICE_TAGS = frozenset({"choice_word", "choice_function", "choice_allowed"})

ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("choice_word")]
    | Annotated[NamedChoice, Tag("choice_function")]
    | Annotated[AllowedChoice, Tag("choice_allowed")],
    Discriminator(
        _choice_form,
        custom_error_type="tool_choice_form",
        custom_error_message='it must be "none", "auto", "required", or an object such as '
        '{"type": "function", "function": {"name": "..."}}',
    ),
]

Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class FunctionCall(Fields):
    name: FunctionName
    arguments: str
    parsed_arguments: Any = None  # added by the official client

    def for_template(self) -> dict[str, Any]:
        """The call as templates expect it: arguments as an object; what is none stays the text that it was."""
        try:
            parsed = pydantic_core.from_json(self.arguments or "{}")
        except ValueError:
            parsed = None
        return {"name": self.name, "arguments": parsed if isinstance(parsed, dict) else self.arguments}


class ToolCall(Fields):
    id: CallId
    type: Literal["function"]
    function: FunctionCall
    index: Integer | None = None  # of streams, which clients put together and send back


def shown_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools for the template; None for none, which templates ask for."""
    return [{"type": "function", "function": tool.function.for_template()} for tool in tools or ()] or None


def check_tools(tools: list[Tool] | None) -> None:
    """Check what no single field shows.

    Raises:
        RequestError: two have one name, one takes no object, or they are too large.
    """
    names: set[str] = set()
    for place, tool in enumerate(tools or ()):
        name = tool.function.name
        if name in names:
            raise RequestError(f"Two tools are called {name[:60]!r}.", param=f"tools.{place}.function.name")
        names.add(name)
        if (tool.function.parameters or {}).get("type", "object") != "object":
            param = f"tools.{place}.function.parameters"
            raise RequestError(f'{param}: arguments are an object, so its type must be "object".', param=param)
    size = sum(_size(tool, place) for place, tool in enumerate(tools or ()))
    if size > MAX_TOOL_BYTES:
        raise RequestError(f"tools can have at most {MAX_TOOL_BYTES} bytes; these have {size}.", param="tools")


def check_choice(tools: list[Tool] | None, choice: ToolChoice | None) -> None:
    """Check that the choice is one among the tools.

    Raises:
        RequestError: naming the field at fault.
    """
    names = {tool.function.name for tool in tools or ()}
    if not names and choice not in (None, "none", "auto"):
        raise RequestError("tool_choice can only be given with tools.", param="tool_choice")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise _unknown_tool(choice.function.name, "tool_choice.function.name")
    if isinstance(choice, AllowedChoice):
        for place, allowed in enumerate(choice.allowed_tools.tools):
            if allowed.function.name not in names:
                raise _unknown_tool(allowed.function.name, f"tool_choice.allowed_tools.tools.{place}.function.name")


def _unknown_tool(name: str, param: str) -> RequestError:
    return RequestError(f"{param}: none of the tools is called {name[:60]!r}.", param=param)


def _size(tool: Tool, place: int) -> int:
    try:
        return len(json.dumps(tool.function.for_template(), allow_nan=False))
    except ValueError:
        raise RequestError("NaN and Infinity are no JSON.", param=f"tools.{place}.function.parameters") from None
