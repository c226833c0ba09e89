"""Fields that constrain the output: what reaches the engine, and what is refused, with its place."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from decoding.errors import RequestError
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest, Grammar
from server.app import build_app
from server.fake_client import FakeEngineClient
from server.openai.json_schema.reading import MAX_NESTING, schema_source
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


# schemas --------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    ({"type": "foo"}, "'#/type' must be one of array, boolean"),
    ({"type": []}, "'#/type' must be one of"),
    ({"type": "string", "pattern": 1}, "'#/pattern' must be a string"),
    ({"properties": {"a/b": {"minLength": -1}}}, "'#/properties/a~1b/minLength' must be a whole number"),
    ({"properties": {"a~b": {"maxItems": True}}}, "'#/properties/a~0b/maxItems' must be a whole number"),
    ({"properties": {"a": 5}}, "'#/properties/a' must be a schema"),
    ({"properties": []}, "'#/properties' must be an object"),
    ({"anyOf": {}}, "'#/anyOf' must be an array"),
    ({"allOf": []}, "'#/allOf' must be an array with at least one"),
    ({"enum": []}, "'#/enum' must be an array with at least one"),
    ({"items": [{}]}, "'#/items' must be one schema; a list of them is called prefixItems"),
    ({"minimum": "1"}, "'#/minimum' must be a finite number"),
    ({"minimum": True}, "'#/minimum' must be a finite number"),
    ({"exclusiveMaximum": True}, "'#/exclusiveMaximum' must be a number: drafts since 6"),
    ({"multipleOf": 0}, "'#/multipleOf' must be a finite number above 0"),
    ({"required": [1]}, "'#/required' must be an array of strings"),
    ({"pattern": "a\\"}, "'#/pattern' must be a string with a whole regular expression"),
    ({"format": "phone"}, "'#/format' must be one of date, date-time"),
    ({"not": {}}, "'#/not' is a keyword that this server cannot enforce"),
    (
        {"anyOf": [{}, {"uniqueItems": True}]},
        "'#/anyOf/1/uniqueItems' is a keyword that this server cannot enforce; leave",
    ),
    ({"nullable": True}, "'#/nullable' is a keyword that this server cannot enforce; write \"type\""),
    ({"maxLenght": 5}, "'#/maxLenght' is no keyword that this server knows: did you mean 'maxLength'"),
    ({"x-guidance": {"lenient": True}}, "'#/x-guidance/lenient' is no option here"),
    ({"x-guidance": {"key_separator": 5}}, "'#/x-guidance/key_separator' must be a string"),
    ({"items": {"x-guidance": {}}}, "'#/items/x-guidance' is no keyword"),
    ({"items": {"$id": "a"}}, "'#/items/$id' is no keyword"),
    ({"$ref": 1}, "'#/$ref' must be a string"),
    ({"$ref": "https://example.org/s.json"}, "'#/$ref' leads out of the schema"),
    ({"$ref": "other.json#/a"}, "'#/$ref' leads out of the schema"),
    ({"$ref": "#a"}, "'#/$ref' must be a JSON pointer"),
    ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "'#/$ref' leads to nothing that is a schema"),
    ({"$ref": "#/enum/0", "enum": [{}]}, "'#/$ref' leads to nothing that is a schema"),
    ({"$ref": "#"}, "'#' can never be satisfied: it needs itself"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "'#/properties/a' can never be satisfied"),
    ({"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}}, "'#' can never be satisfied"),
    ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "'#' can never be satisfied"),
    ({"const": float("nan")}, "its numbers must be finite"),
    ({"minProperties": 2, "required": ["a"]}, "'#/minProperties' can be 1, or the number of required"),
]


@pytest.mark.parametrize(("schema", "words"), WRONG)
def test_the_place_in_a_schema_is_named(schema: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        schema_source(schema, "guided_json")
    assert refused.value.message.startswith(f"guided_json: {words}")
    assert (refused.value.param, refused.value.code) == ("guided_json", "invalid_grammar")


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"description": "x" * 150_000}, "the schema has 150018 bytes"),
        (deep(MAX_NESTING + 1), "more than 64 deep"),
        ({"properties": {str(i): {} for i in range(2001)}}, "more than 2000 properties"),
        (
            {"properties": {str(i): {} for i in range(1500)}, "$defs": {str(i): {} for i in range(600)}},
            "more than 2000",
        ),
        ({"anyOf": [{"enum": list(range(2600))}] * 2}, "more than 5000 values"),
        ({"minLength": 200_000}, "'#/minLength' asks for more than 100000"),
    ],
)
def test_there_are_limits(schema: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        schema_source(schema, "guided_json")
    assert words in refused.value.message
    assert refused.value.code == "grammar_too_complex"


RECURSIVE: list[dict[str, Any]] = [
    {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "prefixItems": [{}], "items": {"$ref": "#"}, "minItems": 1},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {}}},
    {"$defs": {"z": {}, "y": {"$ref": "#/$defs/z"}, "x": {"$ref": "#/$defs/y"}}, "allOf": [{"$ref": "#/$defs/x"}]},
    {"type": "object", "properties": {"": False, "a": {"const": 1}}, "required": ["a"]},
    {"type": ["object", "string"], "required": ["a"], "additionalProperties": {"$ref": "#"}},
]


@pytest.mark.parametrize("schema", RECURSIVE)
def test_recursion_that_can_end_is_fine(schema: dict[str, Any]) -> None:
    assert json.loads(schema_source(schema, "guided_json")) == schema


def test_annotations_are_left_out_where_they_are_none_of_the_data() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/it",
        "title": "It",
        "properties": {"title": {"const": {"title": 1}, "description": "d"}, "x-y": {"x-z": 1, "deprecated": True}},
        "required": ["title"],
        "uniqueItems": False,
        "nullable": False,
    }
    assert json.loads(schema_source(schema, "f")) == {
        "properties": {"title": {"const": {"title": 1}}, "x-y": {}},
        "required": ["title"],
    }


def test_layout_can_be_chosen() -> None:
    schema = {"x-guidance": {"item_separator": ", ", "whitespace_flexible": False}, "type": "array"}
    assert json.loads(schema_source(schema, "f")) == schema


def test_names_of_clients_are_cut() -> None:
    with pytest.raises(RequestError) as refused:
        schema_source({"properties": {"secret" * 1000: {"items": {"y" * 5000: 1}}}}, "f")
    assert len(refused.value.message) < 900


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ('^[^"]*$', '^[^\\x00"]*$'),
        ("[^]a]", "[^]\\x00a]"),
        ("a\\[^b", "a\\[^b"),
        ("\\\\[^b]", "\\\\[^\\x00b]"),
        ("[a-z]^", "[a-z]^"),
    ],
)
def test_negated_classes_are_read_without_nul(pattern: str, read: str) -> None:
    """A compiler's mistake is kept from: with every control character in it, a class has quotes for it, too."""
    named = {"pattern": pattern, "patternProperties": {pattern: {}}}
    assert json.loads(schema_source(named, "f")) == {"pattern": read, "patternProperties": {read: {}}}


@pytest.mark.parametrize(
    ("name", "text", "fits"),
    [
        ("time", "23:59:59Z", True),
        ("time", "09:05:00.125-03:30", True),
        ("time", "23:59:60Z", False),
        ("time", "24:00:00Z", False),
        ("time", "12:00:00", False),
        ("date-time", "2026-11-30T00:00:00+01:00", True),
        ("date-time", "2026-11-31T00:00:00Z", False),
        ("date-time", "2024-02-30T00:00:00Z", False),
        ("date-time", "2024-02-28T12:30:00.5Z", True),
        ("date-time", "2024-02-28 12:30:00Z", False),
    ],
)
def test_times_are_such_as_readers_take(name: str, text: str, fits: bool) -> None:
    read = json.loads(schema_source({"format": name, "maxLength": 40}, "f"))
    assert set(read) == {"pattern", "maxLength"}
    assert (re.search(read["pattern"], text) is not None) is fits
    if fits:
        datetime.datetime.fromisoformat(text if name == "date-time" else f"2024-01-01T{text}")


def test_a_time_with_a_pattern_has_both() -> None:
    read = json.loads(schema_source({"format": "time", "pattern": "^1", "allOf": [{"maxLength": 20}]}, "f"))
    assert read["pattern"] == "^1"
    assert [set(part) for part in read["allOf"]] == [{"maxLength"}, {"pattern"}]


def test_references_have_one_spelling() -> None:
    schema = {"$defs": {"größe": {}, "a/b": {}}, "anyOf": [{"$ref": "#/$defs/größe"}, {"$ref": "#/$defs/a~1b"}]}
    read = json.loads(schema_source(schema, "f"))
    assert read["anyOf"] == [{"$ref": "#/$defs/gr%C3%B6%C3%9Fe"}, {"$ref": "#/$defs/a~1b"}]


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
    assert "properties/a/not'" in check_error(response, 400, "invalid_grammar", "tools")


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_a_grammar_that_becomes_too_complex_is_told_by_its_field(url: str) -> None:
    def gives_up(request: GenerateRequest) -> list[TokenEvent]:
        error = {"error": "It became too complex.", "error_code": "grammar_too_complex"}
        return [TokenEvent(request.request_id, 0, (), finish_reason="error", **error)]  # type: ignore[arg-type]

    whole = {"prompt": "x"} if url == COMPLETIONS else {"messages": HELLO}
    response = client(fake(gives_up), Checker()).post(url, json={**whole, "guided_regex": "a"})
    check_error(response, 400, "grammar_too_complex", "guided_regex")
