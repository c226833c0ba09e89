"""The schemas that forced calls are held to."""

from __future__ import annotations

import json

import jsonschema
import pytest

from decoding.request import Grammar
from server.openai.tools.either import bare, tagged
from server.openai.tools.schema import arguments_schema, calls_schema
from server.openai.tools.table import Either
from tests.engines import demo_tokenizer
from tests.grammars import matcher

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
    functions = {"tree": TREE, "weather": CITY, "now": None}
    schema = calls_schema({name: arguments_schema(each) for name, each in functions.items()}, parallel=parallel)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(calls))


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "weather", "parameters": {"city": "Oslo"}}],
        [{"name": "weather", "parameters": {"city": {"$ref": "#"}}}],
        [{"name": "now", "parameters": {}}, {"name": "weather", "parameters": {"city": "Oslo", "a": 1}}],
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
        [{"name": "now", "parameters": {"a": 1}}],
        [{"name": "weather", "parameters": []}],
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


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([{"name": "tree", "parameters": {"root": {"next": {"next": {}}}, "self": {"root": {}}}}], True),
        ([{"name": "weather", "parameters": {"city": "Oslo"}}, {"name": "now", "parameters": {}}], True),
        ([{"name": "tree", "parameters": {"root": {"next": 1}}}], False),
        ([{"name": "weather", "parameters": {"root": {}}}], False),
        ([{"name": "now", "parameters": {"a": 1}}], False),
        ([], False),
    ],
)
def test_the_engines_library_takes_them_alike(calls: object, right: bool) -> None:
    functions = {name: arguments_schema(each) for name, each in {"tree": TREE, "weather": CITY, "now": None}.items()}
    grammar = Grammar("json_schema", json.dumps(calls_schema(functions, parallel=True)))
    tokens = demo_tokenizer().encode(json.dumps(calls, separators=(",", ":")))
    assert matcher(grammar, 8192).allows((*tokens, 0)) is right


def test_one_call_where_parallel_ones_are_not_wanted() -> None:
    call = {"name": "now", "parameters": {}}
    assert check([call], parallel=False)
    assert not check([call, call], parallel=False)


ANSWER = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "additionalProperties": False}
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TAGGED = f"<tool_call>\n{OSLO}\n</tool_call>"
BARE = OSLO.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("form", "text", "right"),
    [
        (tagged, '{"ok":true}', True),
        (tagged, TAGGED, True),
        (tagged, f"{TAGGED}\n{TAGGED}", True),
        (tagged, '{"ok":1}', False),
        (tagged, f"Hm. {TAGGED}", False),
        (tagged, TAGGED.replace("Oslo", "Rome"), False),
        (tagged, OSLO, False),
        (bare, '{"ok":true}', True),
        (bare, BARE, True),
        (bare, f"{BARE}; {BARE}", True),
        (bare, BARE.replace("Oslo", "Rome"), False),
    ],
)
def test_an_answer_of_a_form_or_calls(form: Either, text: str, right: bool) -> None:
    grammar = form(Grammar("json_schema", json.dumps(ANSWER)), {"weather": CITY}, parallel=True)
    assert grammar is not None
    assert matcher(grammar, 8192).allows((*demo_tokenizer().encode(text), 0)) is right


@pytest.mark.parametrize(("form", "two"), [(tagged, f"{TAGGED}\n{TAGGED}"), (bare, f"{BARE}; {BARE}")])
def test_any_object_or_one_call(form: Either, two: str) -> None:
    assert form(Grammar("regex", "a+"), {"weather": CITY}, parallel=True) is None
    grammar = form(Grammar("json_object"), {"weather": CITY}, parallel=False)
    assert grammar is not None
    assert matcher(grammar, 8192).allows((*demo_tokenizer().encode('{"a":[1]}'), 0))
    assert not matcher(grammar, 8192).allows((*demo_tokenizer().encode(two), 0))
