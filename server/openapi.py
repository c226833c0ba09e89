"""The OpenAPI document: what each path takes and answers, made from the types that requests are parsed with."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from decoding.request import MAX_LOGPROBS, RANGES, Range
from server.openai import answers
from server.openai.chat_schema import ChatFields
from server.openai.completion_schema import CompletionFields
from server.openai.fingerprint import server_version
from server.openai.responses import answers as response_answers
from server.openai.responses.schema import ResponsesFields
from server.openai.tokenize_schema import DetokenizeFields, TokenizeChatFields, TokenizeFields
from server.openai.validation import IGNORED, UNSUPPORTED

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
_LOGPROBS = Range(0, MAX_LOGPROBS)
_SCHEMAS = "#/components/schemas/"
_PARAMETER = re.compile(r"\{(\w+)\}")

_WHY = {
    400: "A field or a header is wrong, or the request does not fit the context; `param` names it.",
    401: "There is no API key, or none that is known here.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json, or it is compressed.",
    429: "The server is overloaded.",
    431: "The headers are too large.",
    500: "A mistake of the server; its log has it under the answer's x-request-id.",
    503: "The server is loading, restarting or shutting down, or the engine has ended.",
    504: "The answer did not begin within the request's deadline.",
}
_HEADERS = {
    401: {"WWW-Authenticate": {"type": "string"}},
    429: {"Retry-After": {"type": "integer"}, "retry-after-ms": {"type": "integer"}},
    503: {"Retry-After": {"type": "integer"}, "retry-after-ms": {"type": "integer"}},
}
_OPEN_ERRORS = (400, 431, 500, 503)  # of what needs no key
_ERRORS = (400, 401, 431, 500)
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 429, 431, 500, 503, 504)
_KEY = "key"


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        answer: the type of its answer's JSON; None: the answer is text.
        requests: the fields of its body, if it has one: one type or another.
        chunk: the type of one event's JSON, where it can stream.
        errors: statuses of its errors.
        failure: the type of a 503's JSON.
        head: whether HEAD is answered as well.
        typed_events: events have their type in a field of their own, and the last one is the end.
    """

    method: str
    path: str
    summary: str
    answer: Any = None
    requests: tuple[type[BaseModel], ...] = ()
    chunk: Any = None
    errors: tuple[int, ...] = _ERRORS
    failure: Any = answers.Error
    head: bool = False
    typed_events: bool = False


def _probe(path: str, summary: str) -> Operation:
    return Operation("get", path, summary, answers.Health, errors=_OPEN_ERRORS, failure=answers.Unhealthy, head=True)


OPERATIONS = (
    Operation(
        "post",
        "/v1/completions",
        "Continue a text",
        answers.Completion,
        (CompletionFields,),
        answers.CompletionChunk,
        _BODY_ERRORS,
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer messages",
        answers.ChatCompletion,
        (ChatFields,),
        answers.ChatCompletionChunk,
        _BODY_ERRORS,
    ),
    Operation(
        "post",
        "/v1/responses",
        "Answer items",
        response_answers.Response,
        (ResponsesFields,),
        response_answers.ResponseEvent,
        _BODY_ERRORS,
        typed_events=True,
    ),
    Operation("get", "/v1/models", "What is served", answers.ModelList, errors=(*_ERRORS, 503)),
    Operation("get", "/v1/models/{name}", "One of the names", answers.Model, errors=(*_ERRORS, 404, 503)),
    Operation(
        "post",
        "/tokenize",
        "A text's tokens",
        answers.Tokens,
        (TokenizeFields, TokenizeChatFields),
        errors=_BODY_ERRORS,
    ),
    Operation("post", "/detokenize", "The text of tokens", answers.Text, (DetokenizeFields,), errors=_BODY_ERRORS),
    Operation("get", "/version", "The server's version", answers.Version),
    _probe("/health", "Whether requests are served"),
    _probe("/ready", "Whether the next request would be taken"),
    _probe("/live", "Whether waiting makes sense"),
    Operation("get", "/metrics", "Counters and gauges in Prometheus' text format"),
    Operation("get", "/openapi.json", "This document", answers.Document),
)


@functools.cache
def document() -> dict[str, Any]:
    """The document, OpenAPI 3.1. It depends on the code alone."""
    schemas, refs = _schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        methods = paths.setdefault(operation.path, {})
        methods[operation.method] = _operation(operation, refs)
        if operation.head:
            methods["head"] = _without_content(methods[operation.method])
    described = "OpenAI's API; see docs/http.md. A field that is not listed here is refused."
    return {
        "openapi": "3.1.0",
        "info": {"title": "Saccade", "version": server_version(), "description": described},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}}},
    }


class _Untitled(GenerateJsonSchema):
    """Without titles that repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schemas() -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """All schemas by name, and of each type its schema or the reference to it."""
    types = {kind for each in OPERATIONS for kind in (each.answer, each.chunk, each.failure, *each.requests) if kind}
    ordered = sorted(types, key=str)
    adapters: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]]
    adapters = [(kind, "validation", TypeAdapter(kind)) for kind in ordered]
    made, rest = TypeAdapter.json_schemas(adapters, ref_template=_SCHEMAS + "{model}", schema_generator=_Untitled)
    schemas: dict[str, Any] = rest["$defs"]
    refs = {kind: made[kind, "validation"] for kind in ordered}
    for request in {request for each in OPERATIONS for request in each.requests}:
        properties = schemas[refs[request]["$ref"].removeprefix(_SCHEMAS)]["properties"]
        _add_ranges(properties)
        _add_other_fields(properties)
    return schemas, refs


def _add_ranges(properties: dict[str, Any]) -> None:
    """Bounds that are checked where the engine's parameters are, and not by the types."""
    spans = {**RANGES, "logprobs": _LOGPROBS, "top_logprobs": _LOGPROBS, "prompt_logprobs": _LOGPROBS}
    for name, span in spans.items():
        field = properties.get(name, {})
        for option in field.get("anyOf", [field]):
            if option.get("type") in ("integer", "number"):
                option |= {"exclusiveMinimum" if span.open_low else "minimum": span.low, "maximum": span.high}


def _add_other_fields(properties: dict[str, Any]) -> None:
    """Fields that are no part of a model: those without an effect, and those that may only say "no"."""
    for name in sorted(IGNORED):
        properties.setdefault(name, {"description": "Accepted, and without an effect."})
    for name, neutral in sorted(UNSUPPORTED.items()):
        only = {"enum": [None, *neutral], "description": "Not supported: another value is refused."}
        properties.setdefault(name, only)


def _operation(operation: Operation, refs: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {TEXT: {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {JSON: {"schema": refs[operation.answer]}}
    if operation.chunk is not None:
        content[EVENTS] = {"schema": _events(refs[operation.chunk], typed=operation.typed_events)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _name_of(operation),
        "responses": {
            "200": {"description": "The answer.", "headers": _headers(200), "content": content},
            **{str(status): _error(status, operation, refs) for status in sorted(operation.errors)},
        },
    }
    if 401 in operation.errors:
        described["security"] = [{_KEY: []}, {}]  # none is needed where the server has none
    if names := _PARAMETER.findall(operation.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.requests:
        forms = [refs[request] for request in operation.requests]
        schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return described


def _name_of(operation: Operation) -> str:
    return "_".join([operation.method, *re.findall(r"\w+", operation.path)])


def _events(chunk: dict[str, Any], *, typed: bool) -> dict[str, Any]:
    frame = (
        "events of the lines `event: TYPE` and `data: {...}`" if typed else "events `data: {...}`, then `data: [DONE]`"
    )
    text = (
        f"With `stream: true`: {frame}, and comments while there is nothing to send. "
        "The JSON of an event is that of `x-event`, or, once, an error."
    )
    return {"type": "string", "description": text, "x-event": chunk}


def _error(status: int, operation: Operation, refs: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    kind = operation.failure if status == 503 else answers.Error
    return {
        "description": _WHY[status],
        "headers": _headers(status),
        "content": {JSON: {"schema": refs[kind]}},
    }


def _headers(status: int) -> dict[str, Any]:
    always = {"x-request-id": {"type": "string"}, **_HEADERS.get(status, {})}
    return {name: {"schema": schema, "required": True} for name, schema in always.items()}


def _without_content(operation: dict[str, Any]) -> dict[str, Any]:
    """What HEAD answers where GET answers this."""
    answers_to_head = {
        status: {key: value for key, value in answer.items() if key != "content"}
        for status, answer in operation["responses"].items()
    }
    return {**operation, "operationId": f"head_{operation['operationId']}", "responses": answers_to_head}
