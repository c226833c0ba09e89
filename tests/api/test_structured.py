"""Fields that constrain the output: what reaches the engine, and what is refused, with its place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from decoding.errors import RequestError
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest, Grammar
from server.app import build_app
from server.fake_client import FakeEngineClient
from tests.api.harness import SETTINGS, fake, saying, tokenizer
from tests.api.test_errors import CHAT, COMPLETIONS, HELLO, check_error

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}, "required": ["b"]}
SOURCE = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"null"}},"required":["b"]}'
FIELD = "response_format.json_schema.schema"


@dataclass
class Checker:
    """Takes every grammar but those whose source has a certain word in it."""

    refused: str = "refuse me"
    seen: list[Grammar] = field(default_factory=list)

    async def check(self, grammar: Grammar, param: str = "grammar") -> None:
        self.seen.append(grammar)
        if self.refused in grammar.source:
            raise RequestError("The grammar takes too long.", param=param, code="grammar_too_complex")


def client(engine: FakeEngineClient, checker: Checker) -> TestClient:
    return TestClient(build_app(engine, tokenizer(), SETTINGS, grammars=checker), raise_server_exceptions=False)


def post(body: dict[str, Any], url: str = COMPLETIONS) -> tuple[Any, FakeEngineClient, Checker]:
    engine, checker = fake(saying("1", reason="stop")), Checker()
    whole = {"prompt": "x"} if url == COMPLETIONS else {"messages": HELLO}
    return client(engine, checker).post(url, json={**whole, **body}), engine, checker


def formatted(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}}


ACCEPTED: list[tuple[dict[str, Any], Grammar | None]] = [
    ({}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
    (formatted(SCHEMA), Grammar("json_schema", SOURCE)),
    (formatted(SCHEMA, strict=True, description="d"), Grammar("json_schema", SOURCE)),
    ({"guided_json": SCHEMA}, Grammar("json_schema", SOURCE)),
    ({"guided_json": json.dumps(SCHEMA)}, Grammar("json_schema", SOURCE)),
    ({"guided_json": {}}, Grammar("json_schema", "{}")),
    ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    ({"guided_choice": ["yes", "nö", "yes"]}, Grammar("choice", '["yes", "nö"]')),
    ({"guided_grammar": 'start: "a"'}, Grammar("grammar", 'start: "a"')),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", SOURCE)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar("json_schema", SOURCE)),
    ({"structured_outputs": {"regex": "a", "json": None, "json_object": False}}, Grammar("regex", "a")),
    ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", '["a"]')),
    ({"structured_outputs": {"grammar": "start: /a/"}}, Grammar("grammar", "start: /a/")),
    ({"structured_outputs": {"json_object": True, "disable_fallback": True}}, Grammar("json_object")),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, Grammar("json_object")),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, Grammar("regex", "a")),
]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("body", "grammar"), ACCEPTED)
def test_one_grammar_reaches_the_checker_and_then_the_engine(
    body: dict[str, Any], grammar: Grammar | None, url: str
) -> None:
    response, engine, checker = post(body, url)
    assert response.status_code == 200, response.text
    assert [request.grammar for request in engine.requests] == [grammar]
    assert checker.seen == ([] if grammar is None else [grammar])


def test_every_prompt_of_a_request_has_it_and_it_is_checked_once() -> None:
    response, engine, checker = post({"prompt": ["a", "b"], "guided_regex": "x", "n": 2})
    assert response.status_code == 200
    assert [request.grammar for request in engine.requests] == [Grammar("regex", "x")] * 2
    assert len(checker.seen) == 1


REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"response_format": 5}, "response_format", "invalid_value", "it must be an object"),
    ({"response_format": {}}, "response_format.type", "missing_required_parameter", "missing"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value", "'text', 'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter", ""),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "missing_required_parameter",
        "",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        FIELD,
        "missing_required_parameter",
        "",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
        "invalid_value",
        "it must match",
    ),
    (formatted({}, stict=True), "response_format.json_schema.stict", "unknown_parameter", "did you mean 'strict'"),
    (formatted({}, shema={}), "response_format.json_schema.shema", "unknown_parameter", "did you mean 'schema'"),
    (formatted([]), FIELD, "invalid_value", "it must be an object"),
    (formatted({}, strict=1), "response_format.json_schema.strict", "invalid_value", "true or false"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        "response_format.json_schema",
        "invalid_value",
        "only be given with",
    ),
    ({"guided_json": 5}, "guided_json", "invalid_value", "a JSON schema"),
    ({"guided_json": "{"}, "guided_json", "invalid_value", "valid JSON"),
    ({"guided_json": "7"}, "guided_json", "invalid_value", "a JSON schema"),
    ({"guided_regex": ""}, "guided_regex", "invalid_grammar", "empty"),
    ({"guided_regex": ["a"]}, "guided_regex", "invalid_value", "a string"),
    ({"guided_regex": "a" * 20_000}, "guided_regex", "grammar_too_complex", "20000 bytes"),
    ({"guided_choice": []}, "guided_choice", "invalid_value", "empty"),
    ({"guided_choice": "ab"}, "guided_choice", "invalid_value", "an array"),
    ({"guided_choice": ["a", 1]}, "guided_choice.1", "invalid_value", "a string"),
    ({"guided_choice": [str(i) for i in range(1001)]}, "guided_choice", "invalid_value", "at most 1000"),
    ({"guided_grammar": ""}, "guided_grammar", "invalid_grammar", "empty"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value", "guided_regex and guided_choice"),
    (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "guided_regex",
        "invalid_value",
        "response_format and guided_regex",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "invalid_value", "must have one of: json, regex"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "invalid_value", "must have one of"),
    (
        {"structured_outputs": {"regex": "a", "json_object": True}},
        "structured_outputs.json_object",
        "invalid_value",
        "together",
    ),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unknown_parameter", "did you mean 'regex'"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "unknown_parameter", "did you mean 'json'"),
    (
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " *"}},
        "structured_outputs.whitespace_pattern",
        "invalid_value",
        "null",
    ),
    (
        {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
        "unsupported_value",
        "additionalProperties",
    ),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "unsupported_parameter", ""),
    ({"guided_regex": "refuse me"}, "guided_regex", "grammar_too_complex", "The grammar takes too long."),
    (formatted({"const": "refuse me"}), FIELD, "grammar_too_complex", "The grammar takes too long."),
]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("body", "param", "code", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], param: str, code: str, words: str, url: str) -> None:
    response, engine, _ = post(body, url)
    assert words in check_error(response, 400, code, param)
    assert engine.requests == []


def test_a_stream_is_refused_before_it_begins() -> None:
    response, _, _ = post({"stream": True, "guided_regex": "refuse me"})
    check_error(response, 400, "grammar_too_complex", "guided_regex")


def test_a_cut_off_expression_is_refused() -> None:
    response, _, _ = post({"guided_regex": "a\\"})
    check_error(response, 400, "invalid_grammar", "guided_regex")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}


@pytest.mark.parametrize("rule", [{"guided_regex": "a"}, formatted({}), {"response_format": {"type": "json_object"}}])
def test_beside_tools_a_form_holds_where_there_is_no_choice(rule: dict[str, Any]) -> None:
    def held(choice: str) -> Grammar | None:
        response, engine, _ = post({"tools": [TOOL], "tool_choice": choice, **rule}, CHAT)
        assert response.status_code == 200, response.text
        return engine.requests[0].grammar

    none, required = held("none"), held("required")
    assert none is not None
    assert required is not None
    assert '"name":{"const":"add"}' in required.source
    assert none.source != required.source


def test_what_a_tool_may_be_given_is_read_like_any_schema() -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    response, _, _ = post({"tools": [tool], "tool_choice": "required"}, CHAT)
    assert "'#/properties/a/not'" in check_error(response, 400, "invalid_grammar", "tools.0.function.parameters")


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_a_grammar_that_becomes_too_complex_is_told_by_its_field(url: str) -> None:
    def gives_up(request: GenerateRequest) -> list[TokenEvent]:
        error = {"error": "It became too complex.", "error_code": "grammar_too_complex"}
        return [TokenEvent(request.request_id, 0, (), finish_reason="error", **error)]  # type: ignore[arg-type]

    whole = {"prompt": "x"} if url == COMPLETIONS else {"messages": HELLO}
    response = client(fake(gives_up), Checker()).post(url, json={**whole, "guided_regex": "a"})
    check_error(response, 400, "grammar_too_complex", "guided_regex")
