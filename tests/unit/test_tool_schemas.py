"""The schemas that forced calls are held to."""

from __future__ import annotations

import jsonschema
import pytest

from server.openai.tools.schema import calls_schema

TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}, "default": {"$ref": "#/$defs/node"}, "self": {"$ref": "#"}},
    "required": ["root"],
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    },
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", {"$ref": "#"}]}}, "required": ["city"]}


def check(calls: object, *, parallel: bool = True) -> bool:
    schema = calls_schema([("tree", TREE), ("weather", CITY), ("now", None)], parallel=parallel)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(calls))


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "weather", "parameters": {"city": "Oslo"}}],
        [{"name": "weather", "parameters": {"city": {"$ref": "#"}}}],
        [{"name": "now", "parameters": {}}, {"name": "now", "parameters": {"a": 1}}],
        [{"name": "tree", "parameters": {"root": {"next": {"next": {}}}, "default": {}}}],
        [{"name": "tree", "parameters": {"root": {}, "self": {"root": {}}}}],
    ],
)
def test_right_calls(calls: object) -> None:
    assert check(calls)


@pytest.mark.parametrize(
    "calls",
    [
        [],
        {"name": "now", "parameters": {}},
        [{"name": "now"}],
        [{"name": "then", "parameters": {}}],
        [{"name": "now", "parameters": {}, "id": 1}],
        [{"name": "weather", "parameters": {"city": "Rome"}}],
        [{"name": "weather", "parameters": {"root": {}}}],
        [{"name": "tree", "parameters": {"root": {"next": {"next": 1}}}}],
        [{"name": "tree", "parameters": {"root": {}, "default": 1}}],
        [{"name": "tree", "parameters": {"root": {}, "self": {}}}],
    ],
)
def test_wrong_calls(calls: object) -> None:
    assert not check(calls)


def test_one_call_where_parallel_ones_are_not_wanted() -> None:
    call = {"name": "now", "parameters": {}}
    assert check([call], parallel=False)
    assert not check([call, call], parallel=False)
