"""Level 5: anyOf, oneOf, allOf, and types in a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.schemas.case import BOOL, DIGIT, NULL, WORD, Case, Schema, array, closed, one_of, pattern, ref, text, whole

EITHER: dict[str, list[Any]] = {
    "integer or word": [DIGIT, WORD],
    "null or object": [NULL, closed({"a": DIGIT})],
    "array or scalar": [array(DIGIT, 3, 1), DIGIT],
    "two objects": [closed({"a": DIGIT}), closed({"b": BOOL})],
    "objects that share a name": [closed({"a": DIGIT, "b": DIGIT}), closed({"a": DIGIT, "c": BOOL})],
    "objects, one within the other": [closed({"a": DIGIT}), closed({"a": DIGIT, "b": DIGIT})],
    "ranges apart": [whole(0, 9), whole(100, 109)],
    "ranges that overlap": [whole(0, 50), whole(25, 75)],
    "patterns": [pattern("^a[0-9]{2}$"), pattern("^[a-f]{3}$"), pattern("^zz$")],
    "constants": [{"const": 1}, {"const": "one"}, {"const": [1]}],
    "one branch alone": [closed({"only": BOOL})],
    "a branch that cannot be": [False, DIGIT],
    "in each other": [{"anyOf": [DIGIT, {"anyOf": [BOOL, NULL]}]}, one_of("deep")],
    "of arrays": [array(DIGIT, 2, 2), array(BOOL, 3, 3)],
    "of tuples": [
        {"type": "array", "prefixItems": [{"const": "x"}, DIGIT], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [{"const": "y"}, BOOL], "items": False, "minItems": 2},
    ],
    "ten branches": [closed({f"kind{i}": whole(i, i + 9)}) for i in range(10)],
}

TAGGED = [
    closed({"kind": {"const": "circle"}, "radius": whole(1, 99)}),
    closed({"kind": {"const": "rectangle"}, "width": whole(1, 99), "height": whole(1, 99)}),
    closed({"kind": {"const": "text"}, "words": text(16, 1)}),
]

EXACTLY_ONE: dict[str, list[Schema]] = {
    "by type": [DIGIT, BOOL, text(4)],
    "by tag": TAGGED,
    "by a constant": [{"const": "a"}, {"const": "b"}, {"const": 3}],
    "null or array": [NULL, array(DIGIT, 2, 1)],
    "array or object": [array(DIGIT, 2), closed({"n": DIGIT})],
}

BOTH: dict[str, list[Schema]] = {
    "two bounds": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 7}],
    "range and multiple": [whole(0, 100), {"type": "integer", "multipleOf": 9}],
    "two multiples": [whole(0, 200), {"multipleOf": 4}, {"multipleOf": 6}],
    "two lengths": [{"type": "string", "minLength": 3}, {"type": "string", "maxLength": 5}],
    "length and pattern": [pattern("^[xyz]*$"), text(5, 4)],
    "two patterns": [pattern("^[a-m]{1,8}$"), pattern("^[h-z]{1,8}$")],
    "enum and pattern": [one_of("cat", "dog", "cow", "cod"), pattern("^c")],
    "two enums": [one_of(1, 2, 3, 4, 5), one_of(4, 5, 6)],
    "two objects": [
        {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
        {"type": "object", "properties": {"b": BOOL}, "required": ["b"], "maxProperties": 2},
    ],
    "object and its requirement": [closed({"a": DIGIT, "b": DIGIT}, ("a", "b")), {"required": ["b"]}],
    "items and their number": [{"type": "array", "items": DIGIT}, {"minItems": 2, "maxItems": 3}],
    "one alone": [closed({"x": BOOL})],
}


_0_99 = {"minimum": 0, "maximum": 99}


def cases() -> Iterator[Case]:
    for name, schemas in EITHER.items():
        yield Case(f"anyOf/{name}", 5, {"anyOf": schemas})
    for name, schemas in EXACTLY_ONE.items():
        yield Case(f"oneOf/{name}", 5, {"oneOf": schemas})
    for name, schemas in BOTH.items():
        yield Case(f"allOf/{name}", 5, {"allOf": schemas})
    yield from _mixed()


def _mixed() -> Iterator[Case]:
    yield Case("mixed/array of tagged", 5, array({"oneOf": TAGGED}, 3, 1))
    union = {"oneOf": [ref("circle"), ref("text")], "discriminator": {"propertyName": "kind"}}
    yield Case("mixed/tagged union of references", 5, {**union, "$defs": {"circle": TAGGED[0], "text": TAGGED[2]}})
    shapes = {"$defs": {"circle": TAGGED[0], "text": TAGGED[2]}}
    yield Case("mixed/anyOf of references", 5, {"anyOf": [ref("circle"), ref("text")], **shapes})
    yield Case("mixed/anyOf beside a type", 5, {"type": "integer", "anyOf": [{"minimum": 90}, {"maximum": 9}], **_0_99})
    base = {"type": "object", "properties": {"id": DIGIT}, "required": ["id"]}
    more = {"properties": {"name": WORD}, "required": ["name"], "maxProperties": 2}
    yield Case("mixed/allOf of a reference", 5, {"allOf": [ref("base"), more], "$defs": {"base": base}})
    either = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    yield Case("mixed/one of two is required", 5, {**closed({"a": DIGIT, "b": DIGIT}, ("a", "b")), **either})
    yield Case("mixed/nullable everywhere", 5, closed({n: {"anyOf": [DIGIT, NULL]} for n in "abcd"}))
    yield Case("mixed/list of types", 5, array({"type": ["integer", "null", "boolean"], **_0_99}, 4, 2))
    inner = {"anyOf": [closed({"ok": {"const": True}, "value": DIGIT}), closed({"ok": {"const": False}, "why": WORD})]}
    yield Case("mixed/result or error", 5, closed({"results": array(inner, 2, 1)}))
    deep = {"allOf": [{"anyOf": [whole(0, 40), whole(60, 99)]}, {"anyOf": [whole(30, 70), whole(95, 99)]}]}
    yield Case("mixed/allOf of anyOf", 5, deep)
    yield Case(
        "mixed/types and their words", 5, {"type": ["array", "string"], "items": BOOL, "maxItems": 2, "maxLength": 3}
    )
