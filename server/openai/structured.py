"""Fields that say what the whole output must match: OpenAI's response_format, vLLM's structured_outputs and guided_*.

All of them come down to one grammar, and a request can have one at most.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from decoding.errors import RequestError
from decoding.request import Grammar
from server.grammar_worker import GrammarCheck
from server.openai.fields import Fields
from server.openai.json_schema.keywords import is_cut_off
from server.openai.json_schema.reading import schema_source

MAX_LISTED = 1000  # texts of a choice
MAX_CHOICE_BYTES = 64 * 2**10
MAX_PATTERN_BYTES = 16 * 2**10
MAX_GRAMMAR_BYTES = 64 * 2**10
RULES = ("json", "regex", "choice", "grammar", "json_object")
NOTHING: tuple[Any, ...] = (None, False)  # values that ask for no rule


def _as_schema(value: Any) -> Any:
    """vLLM's clients send a schema as an object or as its JSON text."""
    if isinstance(value, str):
        try:
            value = pydantic_core.from_json(value)
        except ValueError:
            raise PydanticCustomError("schema_text", "it is a string, and not one of valid JSON") from None
    if not isinstance(value, dict):
        raise PydanticCustomError("schema_form", "it must be a JSON schema: an object, or its JSON text")
    return value


SchemaInput = Annotated[dict[str, Any], BeforeValidator(_as_schema)]
Listed = Annotated[list[str], Field(min_length=1, max_length=MAX_LISTED)]


class JsonSchemaFields(Fields):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None  # for models that are told of the format; no template here is
    strict: bool | None = None  # nothing is looser without it: what cannot be enforced is refused either way


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFields | None = None


class StructuredOutputs(Fields):
    """vLLM's. Switches that ask for nothing are taken, and no others."""

    json_: Annotated[SchemaInput | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Listed | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None  # there is one compiler, and nothing to fall back to
    disable_any_whitespace: bool | None = None  # there is none but what a schema asks for
    disable_additional_properties: bool | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


@dataclass(frozen=True)
class Constraint:
    """What the whole output must match, and the field that says so."""

    grammar: Grammar
    param: str


@dataclass(frozen=True)
class _Asked:
    param: str
    rule: str
    value: Any


class StructuredFields(Fields):
    """To be inherited by the fields of an endpoint."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaInput | None = None
    guided_regex: str | None = None
    guided_choice: Listed | None = None
    guided_grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """The one that the request asks for; reads a JSON schema through, which can take some milliseconds.

        Raises:
            RequestError: there are several, or it cannot be enforced; naming the field at fault.
        """
        asked = [*self._of_response_format(), *self._of_structured_outputs(), *self._of_guided()]
        if len(asked) > 1:
            names = " and ".join(each.param for each in asked)
            raise RequestError(
                f"{names} cannot be given together: each says what the whole output is; leave all but one out.",
                param=asked[1].param,
            )
        return _constraint(asked[0]) if asked else None

    def _of_response_format(self) -> Iterator[_Asked]:
        given = self.response_format
        if given is None:
            return
        param = "response_format.json_schema"
        if given.type == "json_schema" and given.json_schema is None:
            raise RequestError(f"The field {param} is missing.", param=param, code="missing_required_parameter")
        if given.type != "json_schema" and given.json_schema is not None:
            raise RequestError(f'{param} can only be given with the type "json_schema".', param=param)
        if given.json_schema is not None:
            yield _Asked(f"{param}.schema", "json", given.json_schema.schema_)
        elif given.type == "json_object":
            yield _Asked("response_format", "json_object", True)

    def _of_structured_outputs(self) -> Iterator[_Asked]:
        if self.structured_outputs is None:
            return
        given = self.structured_outputs
        if given.disable_additional_properties:
            param = "structured_outputs.disable_additional_properties"
            message = f"{param}: write additionalProperties: false into the schema, where it is meant."
            raise RequestError(message, param=param, code="unsupported_value")
        values = {rule: getattr(given, "json_" if rule == "json" else rule) for rule in RULES}
        given_rules = [(rule, value) for rule, value in values.items() if value not in NOTHING]
        if not given_rules:
            rules = ", ".join(RULES)
            raise RequestError(f"structured_outputs must have one of: {rules}.", param="structured_outputs")
        for rule, value in given_rules:
            yield _Asked(f"structured_outputs.{rule}", rule, value)

    def _of_guided(self) -> Iterator[_Asked]:
        for rule in RULES[:-1]:
            value = getattr(self, f"guided_{rule}")
            if value is not None:
                yield _Asked(f"guided_{rule}", rule, value)


def _constraint(asked: _Asked) -> Constraint:
    value, param = asked.value, asked.param
    if asked.rule == "json":
        grammar = Grammar("json_schema", schema_source(value, param))
    elif asked.rule == "json_object":
        grammar = Grammar("json_object")
    elif asked.rule == "choice":
        texts = json.dumps(list(dict.fromkeys(value)), ensure_ascii=False)
        grammar = Grammar("choice", _bounded(texts, MAX_CHOICE_BYTES, param))
    elif asked.rule == "regex":
        if is_cut_off(value):
            message = f"{param}: it ends with a backslash, and nothing follows that it could escape."
            raise RequestError(message, param=param, code="invalid_grammar")
        grammar = Grammar("regex", _bounded(value, MAX_PATTERN_BYTES, param))
    else:
        grammar = Grammar("grammar", _bounded(value, MAX_GRAMMAR_BYTES, param))
    return Constraint(grammar, param)


def _bounded(source: str, most: int, param: str) -> str:
    """What is worth compiling.

    Raises:
        RequestError: it is empty, or has more bytes than ``most``.
    """
    if not source:
        raise RequestError(f"{param}: it must not be empty.", param=param, code="invalid_grammar")
    size = len(source.encode())
    if size > most:
        message = f"{param}: it has {size} bytes; {most} are the most."
        raise RequestError(message, param=param, code="grammar_too_complex")
    return source


async def checked_constraint(fields: StructuredFields, grammars: GrammarCheck) -> Constraint | None:
    """What a request's output must match, after everything that can be wrong with that was looked for.

    Raises:
        RequestError: naming the field at fault.
        UnavailableError: too many grammars wait to be checked.
    """
    if not fields.model_fields_set & StructuredFields.model_fields.keys():
        return None
    constraint = await asyncio.to_thread(fields.constraint)
    if constraint is not None:
        await grammars.check(constraint.grammar, constraint.param)
    return constraint
