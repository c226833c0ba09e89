"""What a request's tools come to: what the template prints, what the output is held to, how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from decoding.errors import RequestError
from decoding.request import Grammar
from server.openai.json_schema.reading import schema_source
from server.openai.tools.base import Offer, ToolParser
from server.openai.tools.fields import AllowedChoice, NamedChoice, Tool, ToolChoice, shown_tools
from server.openai.tools.forced import ForcedArgumentsParser, ForcedCallsParser
from server.openai.tools.schema import arguments_schema, calls_schema
from server.openai.tools.table import Either, ToolFormat, new_call_id


@dataclass(frozen=True)
class ToolPlan:
    """How a request's tools are used; by default, there are none.

    Attributes:
        shown: for the template; None: the model is not to know of any.
        grammar: what the output is held to.
        schemas: of the parameters of each function that may be called.
        parser: reads an output; None: there are no calls in it.
        new_id: makes a call's id.
        parallel: more than one call may be told.
        either: makes a grammar of outputs that are calls or what another grammar says; None: there is no such thing.
    """

    shown: list[dict[str, Any]] | None = None
    grammar: Grammar | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parser: Callable[[Offer], ToolParser] | None = None
    new_id: Callable[[], str] = new_call_id
    parallel: bool = True
    either: Callable[[Grammar], Grammar | None] | None = None

    @property
    def names(self) -> frozenset[str]:
        """The functions that may be called."""
        return frozenset(self.schemas)

    def new_parser(self, hidden: frozenset[str]) -> ToolParser | None:
        """A parser for one output; ``hidden`` are the markers that are special tokens."""
        if self.parser is None:
            return None
        return self.parser(Offer(self.names, self.new_id, hidden, self.schemas))


def plan_tools(
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None,
    tool_format: ToolFormat | None,
    *,
    parallel: bool = True,
    template_shows_tools: bool = True,
) -> ToolPlan:
    """What becomes of checked fields.

    Args:
        tool_format: of the served model, if it is known.
        parallel: more than one call is wanted.
        template_shows_tools: the model's chat template prints them.

    Raises:
        RequestError: the model is to choose freely, and cannot call tools; or it is to be held to a schema that cannot
            be enforced.
    """
    if not tools or choice == "none":
        return ToolPlan()
    offered, mode = _offered(tools, choice)
    shown = shown_tools(offered)
    new_id = tool_format.new_id if tool_format is not None else new_call_id
    schemas = {tool.function.name: tool.function.parameters or {} for tool in offered}
    if mode == "auto":
        if tool_format is None or not template_shows_tools:
            raise _cannot_choose(template_shows_tools)
        either = None if tool_format.either is None else partial(_either, tool_format.either, tools, schemas, parallel)
        return ToolPlan(shown, None, schemas, tool_format.parser, new_id, parallel, either)
    held_to = _enforced(tools, schemas)
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        return ToolPlan(shown, _grammar(held_to[name]), {name: schemas[name]}, ForcedArgumentsParser, new_id, parallel)
    grammar = _grammar(calls_schema(held_to, parallel=parallel))
    return ToolPlan(shown, grammar, schemas, ForcedCallsParser, new_id, parallel)


def _enforced(tools: Sequence[Tool], names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The schemas of these functions' arguments as they can be enforced.

    Raises:
        RequestError: one cannot be.
    """
    functions = [(place, tool.function) for place, tool in enumerate(tools) if tool.function.name in names]
    return {function.name: _read(function.parameters, place) for place, function in functions}


def _either(
    form: Either, tools: Sequence[Tool], names: Collection[str], parallel: bool, answer: Grammar
) -> Grammar | None:
    return form(answer, _enforced(tools, names), parallel=parallel)


def _offered(tools: Sequence[Tool], choice: ToolChoice | None) -> tuple[Sequence[Tool], str]:
    """The tools that the model is to know, and whether it may, must, or must call a certain one."""
    if isinstance(choice, AllowedChoice):
        allowed = {each.function.name for each in choice.allowed_tools.tools}
        return [tool for tool in tools if tool.function.name in allowed], choice.allowed_tools.mode
    return tools, "named" if isinstance(choice, NamedChoice) else choice or "auto"


def _read(parameters: dict[str, Any] | None, place: int) -> dict[str, Any]:
    """A tool's schema as it can be enforced.

    Raises:
        RequestError: it cannot, naming the tool and the place in its schema.
    """
    source = schema_source(arguments_schema(parameters), f"tools.{place}.function.parameters")
    enforced: dict[str, Any] = json.loads(source)
    return enforced


def _grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def _cannot_choose(template_shows_tools: bool) -> RequestError:
    if template_shows_tools:
        why = "how this model writes tool calls is unknown; start the server with --tool-call-parser"
    else:
        why = "this model's chat template has no place for tools"
    message = f'Tools cannot be left to the model\'s choice: {why}. With tool_choice "required" it is held to a call.'
    return RequestError(message, param="tools", code="unsupported_parameter")
