"""Schemas as they are read before they are compiled: places of what cannot be enforced, limits, what is rewritten."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from typing import Any

import pytest

from decoding.errors import RequestError
from server.openai.json_schema.reading import MAX_NESTING, schema_source

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
        ("date-time", "2024-02-29T00:00:00Z", True),
        ("date-time", "2023-02-29T00:00:00Z", False),
        ("date-time", "0999-02-28T00:00:00Z", False),
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


def test_days_are_those_of_the_calendar() -> None:
    days = re.compile(json.loads(schema_source({"format": "date"}, "f"))["pattern"])
    for year in (1000, 1600, 1700, 1900, 1996, 2000, 2023, 2024, 2100, 4000, 9999):
        for month, day in itertools.product(range(14), range(33)):
            text = f"{year:04d}-{month:02d}-{day:02d}"
            try:
                datetime.date.fromisoformat(text)
            except ValueError:
                assert days.search(text) is None, text
            else:
                assert days.search(text) is not None, text


def test_a_time_with_a_pattern_has_both() -> None:
    read = json.loads(schema_source({"format": "time", "pattern": "^1", "allOf": [{"maxLength": 20}]}, "f"))
    assert read["pattern"] == "^1"
    assert [set(part) for part in read["allOf"]] == [{"maxLength"}, {"pattern"}]


def test_references_have_one_spelling() -> None:
    schema = {"$defs": {"größe": {}, "a/b": {}}, "anyOf": [{"$ref": "#/$defs/größe"}, {"$ref": "#/$defs/a~1b"}]}
    read = json.loads(schema_source(schema, "f"))
    assert read["anyOf"] == [{"$ref": "#/$defs/gr%C3%B6%C3%9Fe"}, {"$ref": "#/$defs/a~1b"}]


def tagged(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}, **more}, "required": ["kind"]}


TWO = {"a": tagged("a"), "b": tagged("b", x={"type": "integer"})}


@pytest.mark.parametrize(
    ("branches", "excluding"),
    [
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"type": "null"}], True),
        ([{"$ref": "#/$defs/a"}, tagged("c")], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], False),
        ([{"$ref": "#/$defs/a"}, {"type": "object"}], False),
        ([{"$ref": "#/$defs/a"}, {}], False),
        ([{"$ref": "#/$defs/a"}, True], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": "integer"}, {"type": ["string", "null"]}], True),
        ([tagged("a"), {**tagged("b"), "required": []}], False),
        ([tagged("a"), {"properties": {"kind": {"const": "b"}}, "required": ["kind"]}], False),
        ([tagged("a"), {**tagged("x"), "properties": {"kind": {"enum": ["x", "a"]}}}], False),
        ([tagged("a"), {**tagged("x"), "properties": {"kind": {"enum": ["x", "y"]}}}], True),
        ([{"const": 1}, {"const": 1.0}], False),
    ],
)
def test_unions_whose_branches_exclude_each_other(branches: list[Any], excluding: bool) -> None:
    read = json.loads(schema_source({"$defs": TWO, "oneOf": branches, "title": "t"}, "f"))
    assert read == {"$defs": TWO, "anyOf" if excluding else "oneOf": branches}


def test_a_union_that_is_referred_to_stays_where_it_is() -> None:
    schema = {"oneOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/oneOf/0"}}]}
    assert json.loads(schema_source(schema, "f")) == schema
