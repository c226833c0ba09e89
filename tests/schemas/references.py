"""Level 4: definitions, references, recursion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.schemas.case import BOOL, DIGIT, NULL, WORD, Case, Schema, array, closed, one_of, ref, text, whole

POINT = closed({"x": DIGIT, "y": DIGIT})


def with_defs(schema: Schema, **definitions: Any) -> Schema:
    return {**schema, "$defs": definitions}


PLAIN: dict[str, Schema] = {
    "one": with_defs(closed({"at": ref("point")}), point=POINT),
    "used in an array": with_defs(array(ref("point"), 3, 1), point=POINT),
    "used in a tuple": with_defs(
        {"type": "array", "prefixItems": [ref("point"), ref("flag")], "items": False, "minItems": 2},
        point=POINT,
        flag=BOOL,
    ),
    "at the root": with_defs(ref("point"), point=POINT),
    "to a scalar": with_defs(closed({"n": ref("digit")}), digit=DIGIT),
    "in a chain": with_defs(ref("a"), a=ref("b"), b=ref("c"), c=ref("d"), d=closed({"end": BOOL})),
    "to one that comes later": with_defs(closed({"a": ref("z")}), z=ref("m"), m=one_of("late", "later")),
    "never used": with_defs(closed({"a": DIGIT}), unused=text(5), other=ref("unused")),
    "beside a description": with_defs(closed({"at": {**ref("point"), "description": "where"}}), point=POINT),
    "beside a bound": with_defs(closed({"n": {**ref("number"), "maximum": 3}}), number=whole(0, 99)),
    "beside a length": with_defs(closed({"s": {**ref("word"), "maxLength": 4}}), word=WORD),
    "in the old place": {
        **closed({"at": {"$ref": "#/definitions/point"}}),
        "definitions": {"point": POINT},
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "to a property": closed({"first": POINT, "second": {"$ref": "#/properties/first"}}),
    "to the items": closed({"list": array(POINT, 2, 1), "one": {"$ref": "#/properties/list/items"}}),
    "to a branch": closed({"a": {"anyOf": [DIGIT, BOOL]}, "b": {"$ref": "#/properties/a/anyOf/1"}}),
    "to a part of a tuple": closed(
        {
            "pair": {"type": "array", "prefixItems": [WORD, DIGIT], "items": False, "minItems": 2},
            "head": {"$ref": "#/properties/pair/prefixItems/0"},
        }
    ),
    "with escapes": with_defs(
        closed({"a": {"$ref": "#/$defs/x~1y"}, "b": {"$ref": "#/$defs/x~0y"}, "c": {"$ref": "#/$defs/x%25y"}}),
        **{"x/y": DIGIT, "x~y": BOOL, "x%y": NULL},
    ),
    "with spaces and umlauts": with_defs(
        closed({"a": {"$ref": "#/$defs/my%20type"}, "b": {"$ref": "#/$defs/gr%C3%B6%C3%9Fe"}}),
        **{"my type": DIGIT, "größe": one_of("S", "M", "L")},
    ),
    "inside of definitions": with_defs(
        ref("outer"), outer=closed({"in": {"$ref": "#/$defs/outer/$defs/inner"}}, (), **{"$defs": {"inner": DIGIT}})
    ),
    "with an id of the root": {
        "$id": "https://example.org/point.json",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **with_defs(closed({"at": ref("point")}), point=POINT),
    },
}


def shown(example: str) -> str:
    """A prompt that shows a short one, so that a small model knows that such things end."""
    names = ("first", "second", "third", "fourth")
    return (
        "import json\n\n"
        + "".join(f"{name} = json.loads('''{example}''')\n" for name in names)
        + "answer = json.loads('''"
    )


RECURSIVE: dict[str, tuple[Schema, str]] = {
    "linked list": (
        closed({"value": DIGIT, "next": {"anyOf": [NULL, {"$ref": "#"}]}}),
        '{"value":1,"next":null}',
    ),
    "list by a definition": (
        with_defs(ref("node"), node=closed({"v": DIGIT, "rest": {"anyOf": [ref("node"), NULL]}})),
        '{"v":3,"rest":null}',
    ),
    "optional link": (closed({"id": DIGIT, "parent": {"$ref": "#"}}, ("parent",)), '{"id":4}'),
    "tree": (
        with_defs(ref("tree"), tree=closed({"name": WORD, "children": array(ref("tree"), 2)})),
        '{"name":"leaf","children":[]}',
    ),
    "binary tree": (
        with_defs(
            ref("tree"), tree={"anyOf": [NULL, closed({"left": ref("tree"), "key": DIGIT, "right": ref("tree")})]}
        ),
        '{"left":null,"key":1,"right":null}',
    ),
    "expression": (
        with_defs(
            ref("e"),
            e={"anyOf": [DIGIT, closed({"op": one_of("+", "-", "*"), "a": ref("e"), "b": ref("e")})]},
        ),
        '{"op":"+","a":1,"b":2}',
    ),
    "even and odd": (
        with_defs(
            ref("even"),
            even={"anyOf": [NULL, closed({"even": ref("odd")})]},
            odd={"anyOf": [NULL, closed({"odd": ref("even")})]},
        ),
        '{"even":null}',
    ),
    "arrays of arrays": (with_defs(ref("a"), a=array(ref("a"), 2)), "[[],[[]]]"),
    "files and folders": (
        with_defs(
            ref("folder"),
            folder=closed({"name": WORD, "entries": array({"anyOf": [ref("file"), ref("folder")]}, 2)}),
            file=closed({"name": WORD, "bytes": whole(0, 9999)}),
        ),
        '{"name":"src","entries":[]}',
    ),
    "comments with answers": (
        with_defs(ref("c"), c=closed({"by": WORD, "text": text(12), "answers": array(ref("c"), 1)})),
        '{"by":"ann","text":"hello","answers":[]}',
    ),
    "markup": (
        with_defs(
            ref("node"),
            node={"anyOf": [text(8), closed({"tag": one_of("p", "b", "i"), "inner": array(ref("node"), 2)})]},
        ),
        '{"tag":"p","inner":["text"]}',
    ),
    "whatever JSON": (
        with_defs(
            ref("json"),
            json={"anyOf": [NULL, BOOL, DIGIT, text(6), array(ref("json"), 2)]},
        ),
        '[1,"a"]',
    ),
}


def cases() -> Iterator[Case]:
    for name, schema in PLAIN.items():
        yield Case(f"reference/{name}", 4, schema)
    for name, (schema, example) in RECURSIVE.items():
        yield Case(f"recursion/{name}", 4, schema, shown(example))
