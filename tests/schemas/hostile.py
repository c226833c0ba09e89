"""Requests that mean harm, or are mistaken: schemas, expressions and grammars, and what the server must say to each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INVALID, COMPLEX, VALUE = "invalid_grammar", "grammar_too_complex", "invalid_value"
SCHEMA = "response_format.json_schema.schema"


@dataclass(frozen=True)
class Hostile:
    """One request: ``body`` is added to an ordinary one, or is the bytes of a whole one."""

    name: str
    body: dict[str, Any] | bytes
    param: str | None  # at fault; of a request that is served, the field that it is about
    code: str | None  # None: it is odd, and served
    heavy: bool = False  # what is served by a fast machine may be too complex for a slow one


def formatted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def needs(name: str) -> dict[str, Any]:
    """An object that must hold what another definition describes."""
    return {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{name}"}}, "required": ["a"]}


WRONG_SCHEMAS: dict[str, Any] = {
    "a type that is none": {"type": "foo"},
    "a number for a pattern": {"type": "string", "pattern": 1},
    "a type that is a number": {"type": ["integer", 7]},
    "no types": {"type": []},
    "properties in an array": {"type": "object", "properties": []},
    "a property that is no schema": {"type": "object", "properties": {"a": "integer"}},
    "required as a string": {"type": "object", "required": "a"},
    "an enum of nothing": {"enum": []},
    "a choice of nothing": {"anyOf": []},
    "items of an old draft": {"type": "array", "items": [{"type": "integer"}]},
    "a bound in quotes": {"type": "integer", "minimum": "5"},
    "a bound of an old draft": {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
    "a negative length": {"type": "string", "minLength": -1},
    "half a length": {"type": "string", "maxLength": 1.5},
    "multiples of nothing": {"type": "integer", "multipleOf": 0},
    "a keyword with a typing error": {"type": "string", "maxLenght": 5},
    "not": {"not": {"type": "integer"}},
    "if and then": {"if": {"type": "integer"}, "then": {"minimum": 1}},
    "unique items": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "names of properties": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "options of the compiler": {"x-guidance": {"lenient": True}, "not": {}},
    "options of the compiler deep inside": {"type": "object", "properties": {"a": {"x-guidance": {}}}},
    "a format that nobody knows": {"type": "string", "format": "no-such-format"},
    "a reference to the internet": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to a name": {"$ref": "#item"},
    "a reference to nothing": {"$ref": "#/$defs/missing"},
    "a reference to what is no schema": {"$ref": "#/title", "title": "x"},
    "a reference that is a number": {"$ref": 5},
    "an id of its own inside": {"$defs": {"a": {"$id": "http://other/", "type": "integer"}}, "$ref": "#/$defs/a"},
    "itself": {"$ref": "#"},
    "a loop of references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "a loop over allOf": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    "an object in itself without end": {"$defs": {"a": needs("b"), "b": needs("a")}, **needs("a")},
    "an array in itself without end": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "a range of nothing": {"type": "integer", "minimum": 5, "maximum": 3},
    "a range between numbers": {"type": "integer", "minimum": 5.2, "maximum": 5.8},
    "a required property that is forbidden": nested(1) | {"properties": {"a": False}},
    "two types at once": {"allOf": [{"type": "integer"}, {"type": "string"}]},
    "an enum of another type": {"type": "integer", "enum": ["a", "b"]},
    "lengths that contradict": {"type": "string", "minLength": 5, "maxLength": 2},
    "a pattern longer than its length": {"type": "string", "pattern": "^a{9}$", "maxLength": 5},
    "a pattern with a look ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "a pattern with a reference back": {"type": "string", "pattern": "^(a)\\1$"},
    "a pattern that is open": {"type": "string", "pattern": "(["},
}

LARGE_SCHEMAS: dict[str, Any] = {
    "schemas 80 deep": nested(80),
    "a megabyte": {"type": "string", "description": "x" * 2**20},
    "3000 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}},
    "6000 values": {"enum": list(range(6000))},
    "a thousand million items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a thousand million characters": {"type": "string", "minLength": 10**9},
    "a product of choices": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(1, 40)]},
}

ODD_SCHEMAS: dict[str, Any] = {
    "lengths within lengths": {
        "type": "array",
        "minItems": 9000,
        "items": {"type": "array", "minItems": 9000, "items": {"type": "string", "minLength": 9000}},
    },
    "at most a thousand million booleans": {"type": "array", "items": {"type": "boolean"}, "maxItems": 10**9},
    "a value of NUL": {"const": "\u0000"},
    "a name of NUL": {"type": "object", "properties": {"\u0000": {"const": 1}}, "required": ["\u0000"]},
    "a bound beyond all integers": {"type": "integer", "maximum": 1e300, "minimum": 1e299},
    "names of the machinery": {
        "type": "object",
        "properties": {name: {"const": 1} for name in ("__proto__", "constructor", "$ref")},
        "additionalProperties": False,
    },
    "a loop with a way out": {"anyOf": [{"$ref": "#"}, {"const": 1}]},
}

WRONG_EXPRESSIONS: dict[str, tuple[str, str]] = {
    "open group": ("(ab", INVALID),
    "open class": ("[z", INVALID),
    "range in reverse": ("[z-a]", INVALID),
    "nothing to repeat": ("*a", INVALID),
    "trailing backslash": ("a\\", INVALID),
    "look ahead": ("(?=a)a", INVALID),
    "look behind": ("(?<=a)b", INVALID),
    "reference back": ("(a+)\\1", INVALID),
    "unknown class": ("\\p{NoSuchScript}", INVALID),
    "surrogate": ("\\x{D800}", INVALID),
    "empty": ("", INVALID),
    "NUL": ("a\u0000b", INVALID),
    "nothing fits": ("[^\\s\\S]", INVALID),
    "a megabyte": ("a" * 2**20, COMPLEX),
}

ODD_EXPRESSIONS: dict[str, str] = {
    "a thousand million letters": "[a-z]{1000000000}b",
    "nested quantifiers": "(a+)+b",
    "alternatives that are the same": "(a|a|a|aa)*b",
    "states without number": "(.*a){20}b",
    "the class that backtracks": "([a-zA-Z]+)*[0-9]",
    "a far look back": "[ab]*a[ab]{24}c",
}

WRONG_GRAMMARS: dict[str, tuple[str, str]] = {
    "no grammar": ("][", INVALID),
    "empty": ("", INVALID),
    "a rule that is missing": ("start: other", INVALID),
    "no start": ('first: "a"', INVALID),
    "itself alone": ("start: start", INVALID),
    "a schema that is wrong": ('start: %json {"type": "foo"}', INVALID),
    "a megabyte": (f'start: "{"a" * 2**20}"', COMPLEX),
    "open terminal": ("start: /(/", INVALID),
}

ODD_GRAMMARS: dict[str, str] = {
    "a thousand million letters": 'start: "a"{1000000000}',
    "left recursion": 'start: start "a" | "b"',
    "a text without end": 'start: "a" start',
    "ambiguous without end": 'start: start start | "a" | ""',
}

FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no choices": ({"guided_choice": []}, "guided_choice", VALUE),
    "a choice that is a number": ({"guided_choice": ["a", 1]}, "guided_choice.1", VALUE),
    "50,000 choices": ({"guided_choice": [str(i) for i in range(50_000)]}, "guided_choice", VALUE),
    "a choice of a megabyte": ({"guided_choice": ["a", "b" * 2**20]}, "guided_choice", COMPLEX),
    "a schema that is no JSON": ({"guided_json": '{"type": '}, "guided_json", VALUE),
    "a schema of brackets": ({"guided_json": "[" * 100_000}, "guided_json", VALUE),
    "a surrogate in the text of a schema": ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", VALUE),
    "a schema that is a list": ({"guided_json": "[]"}, "guided_json", VALUE),
    "true for a schema": ({"structured_outputs": {"json": True}}, "structured_outputs.json", VALUE),
    "two fields": ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", VALUE),
    "two rules": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", VALUE),
    "no rule": ({"structured_outputs": {}}, "structured_outputs", VALUE),
    "no schema": (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    "a format that is none": ({"response_format": {"type": "yaml"}}, "response_format.type", VALUE),
}


def requests() -> Iterator[Hostile]:
    """All of them."""
    for name, schema in WRONG_SCHEMAS.items():
        yield Hostile(f"schema: {name}", formatted(schema), SCHEMA, INVALID)
    for name, schema in LARGE_SCHEMAS.items():
        yield Hostile(f"schema: {name}", formatted(schema), SCHEMA, COMPLEX)
    for name, schema in ODD_SCHEMAS.items():
        yield Hostile(f"schema: {name}", formatted(schema), SCHEMA, None)
    for name, (source, code) in WRONG_EXPRESSIONS.items():
        yield Hostile(f"regex: {name}", {"guided_regex": source}, "guided_regex", code)
    for name, source in ODD_EXPRESSIONS.items():
        body = {"structured_outputs": {"regex": source}}
        yield Hostile(f"regex: {name}", body, "structured_outputs.regex", None, heavy=True)
    for name, (source, code) in WRONG_GRAMMARS.items():
        yield Hostile(f"grammar: {name}", {"guided_grammar": source}, "guided_grammar", code)
    for name, source in ODD_GRAMMARS.items():
        yield Hostile(f"grammar: {name}", {"guided_grammar": source}, "guided_grammar", None, heavy=True)
    for name, (body, param, code) in FIELDS.items():
        yield Hostile(f"field: {name}", body, param, code)
    whole = json.dumps({"prompt": "x", **formatted({"type": "integer", "minimum": 12345})})
    yield Hostile("bytes: a bound of NaN", whole.replace("12345", "NaN").encode(), SCHEMA, INVALID)
    yield Hostile("bytes: a bound of 1e400", whole.replace("12345", "1e400").encode(), SCHEMA, INVALID)
    yield Hostile("bytes: 4000 digits", whole.replace("12345", "9" * 4000).encode(), SCHEMA, INVALID)
    surrogate = json.dumps({"prompt": "x", **formatted({"const": "\ud800"})})
    yield Hostile("bytes: a lone surrogate", surrogate.encode(), None, "invalid_json")
