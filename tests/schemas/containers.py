"""Levels 2 and 3: arrays and objects."""

from __future__ import annotations

from collections.abc import Iterator

from tests.schemas.case import BOOL, DIGIT, NULL, WORD, Case, Schema, array, closed, one_of, text, whole

ARRAYS: dict[str, Schema] = {
    "of nothing": array(True, 0),
    "of booleans": array(BOOL, 3),
    "of nulls": array(NULL, 4, 2),
    "of digits": array(DIGIT, 5),
    "of exactly 16 digits": array(DIGIT, 16, 16),
    "of 20 to 24 digits": array(DIGIT, 24, 20),
    "of words": array(WORD, 4, 1),
    "of short texts": array(text(5), 3, 2),
    "of an enum": array(one_of("north", "south", "east", "west"), 6, 2),
    "of a constant": array({"const": "again"}, 5, 3),
    "of mixed scalars": array({"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9}, 5, 2),
    "of multiples": array(whole(0, 60, multipleOf=15), 4, 2),
    "of arrays": array(array(DIGIT, 2), 3),
    "matrix 2 by 2": array(array(DIGIT, 2, 2), 2, 2),
    "matrix 3 by 4": array(array(whole(-9, 9), 4, 4), 3, 3),
    "cube": array(array(array(whole(0, 1), 2, 2), 2, 2), 2, 2),
    "of dates": array({"type": "string", "format": "date"}, 2, 1),
    "of objects": array(closed({"x": DIGIT}), 3, 1),
    "of points": array(closed({"x": whole(-99, 99), "y": whole(-99, 99)}), 3, 2),
    "that may come twice": array(DIGIT, 3, 1, uniqueItems=False),
}

TUPLES: dict[str, Schema] = {
    "pair": {"type": "array", "prefixItems": [DIGIT, BOOL], "items": False, "minItems": 2},
    "pair that may be cut": {"type": "array", "prefixItems": [DIGIT, BOOL], "items": False},
    "head and rest": {"type": "array", "prefixItems": [WORD], "items": DIGIT, "minItems": 2, "maxItems": 4},
    "row of a table": {
        "type": "array",
        "prefixItems": [whole(1, 999), WORD, {"type": "string", "format": "date"}, BOOL, {"type": ["null", "boolean"]}],
        "items": False,
        "minItems": 5,
    },
    "tuples in a tuple": {
        "type": "array",
        "prefixItems": [
            {"type": "array", "prefixItems": [DIGIT, DIGIT], "items": False, "minItems": 2},
            {"type": "array", "prefixItems": [WORD], "items": False, "minItems": 1},
        ],
        "items": False,
        "minItems": 2,
    },
    "constants and a hole": {
        "type": "array",
        "prefixItems": [{"const": "add"}, DIGIT, {"const": "to"}, DIGIT],
        "items": False,
        "minItems": 4,
    },
    "list of tuples": array(
        {"type": "array", "prefixItems": [one_of("push", "pop"), DIGIT], "items": False, "minItems": 2}, 3, 1
    ),
}

OBJECTS: dict[str, Schema] = {
    "empty": closed({}),
    "of one property": closed({"done": BOOL}),
    "of two": closed({"name": WORD, "age": whole(0, 120)}),
    "one is optional": closed({"name": WORD, "nick": WORD}, ("nick",)),
    "all are optional": closed({"a": DIGIT, "b": DIGIT, "c": DIGIT}, ("a", "b", "c")),
    "optional in the middle": closed({"a": DIGIT, "b": DIGIT, "c": DIGIT, "d": DIGIT}, ("b", "c")),
    "optional at both ends": closed({"a": DIGIT, "b": DIGIT, "c": DIGIT}, ("a", "c")),
    "forbidden property": closed({"a": DIGIT, "b": False, "c": DIGIT}, ("b",)),
    "required in another order": {**closed({"a": DIGIT, "b": DIGIT, "c": DIGIT}), "required": ["c", "a", "b"]},
    "with null": closed({"value": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}}),
    "of constants": closed({"version": {"const": 2}, "kind": {"const": "event"}, "final": {"const": True}}),
    "of enums": closed(
        {"size": one_of("S", "M", "L", "XL"), "colour": one_of("red", "blue"), "count": one_of(1, 2, 12)}
    ),
    "of arrays": closed({"xs": array(DIGIT, 3), "ys": array(DIGIT, 3, 3)}),
    "of texts": closed({"title": text(20, 3), "body": text(40)}),
    "one that must not be empty": closed({"a": DIGIT, "b": DIGIT}, ("a", "b"), minProperties=1),
    "of 20 booleans": closed({f"flag{i}": BOOL for i in range(20)}),
    "of 40 optional digits": closed({f"k{i}": DIGIT for i in range(40)}, tuple(f"k{i}" for i in range(40))),
    "with long names": closed({"a_name_that_is_rather_long_and_says_much": BOOL, "another_name_of_some_length": DIGIT}),
    "names that begin alike": closed({"id": DIGIT, "ide": DIGIT, "idea": DIGIT, "ideal": DIGIT, "ideas": DIGIT}),
}

NAMES: dict[str, list[str]] = {
    "umlauts": ["größe", "länge", "straße"],
    "other scripts": ["名前", "возраст", "العمر"],
    "emoji": ["🙂", "👩‍👩‍👧‍👦"],
    "spaces": ["first name", "last name", " "],
    "quotes and backslashes": ['"', "\\", 'a"b\\c'],
    "control characters": ["line\nbreak", "tab\t", "nul\u0000"],
    "empty": [""],
    "words of JSON Schema": ["$ref", "type", "properties", "items", "enum", "required"],
    "of Python": ["__proto__", "__class__", "constructor", "None"],
    "signs": ["a/b", "a~b", "a%25b", "#", "$", "{}", "[0]", ",", ":"],
    "digits": ["0", "1", "10", "-1", "1e3"],
    "of one letter more": ["a", "aa", "aaa", "aaaa"],
    "line separators": ["a\u2028b", "\u0085"],
}

LETTERS = "^[a-z]{1,5}$"
MAPS: dict[str, Schema] = {
    "to digits": {
        "type": "object",
        "patternProperties": {LETTERS: DIGIT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "at least one": {
        "type": "object",
        "patternProperties": {LETTERS: BOOL},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 3,
    },
    "beside named ones": {
        "type": "object",
        "properties": {"ID": DIGIT, "NAME": WORD},
        "required": ["ID", "NAME"],
        "patternProperties": {LETTERS: DIGIT},
        "additionalProperties": False,
        "maxProperties": 4,
    },
    "of two kinds": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": DIGIT, "^b_[a-z]{1,3}$": BOOL},
        "additionalProperties": False,
        "maxProperties": 4,
    },
    "of maps": {
        "type": "object",
        "patternProperties": {
            "^[A-Z]$": {
                "type": "object",
                "patternProperties": {"^[0-9]$": BOOL},
                "additionalProperties": False,
                "maxProperties": 2,
            }
        },
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "that is closed to all": {"type": "object", "additionalProperties": False},
    "with required others": {
        "type": "object",
        "properties": {"a": DIGIT},
        "required": ["a", "b"],
        "additionalProperties": BOOL,
        "maxProperties": 2,
    },
}


def nested(depth: int, width: int) -> Schema:
    """An object in an object in an object ..., each with ``width`` properties."""
    schema: Schema = DIGIT
    for level in range(depth):
        schema = closed({f"{chr(97 + level)}{i}": schema for i in range(width)})
    return schema


def cases() -> Iterator[Case]:
    for name, schema in ARRAYS.items():
        yield Case(f"array/{name}", 2, schema)
    for name, schema in TUPLES.items():
        yield Case(f"tuple/{name}", 2, schema)
    for name, schema in OBJECTS.items():
        yield Case(f"object/{name}", 3, schema)
    for name, keys in NAMES.items():
        yield Case(f"names/{name}", 3, closed(dict.fromkeys(keys, BOOL)))
    for name, schema in MAPS.items():
        yield Case(f"map/{name}", 3, schema)
    for depth, width in ((2, 1), (3, 2), (5, 1), (8, 1), (2, 5), (16, 1)):
        yield Case(f"nested/{depth} deep, {width} wide", 3, nested(depth, width))
    deep: Schema = DIGIT
    for _ in range(10):
        deep = array(deep, 1, 1)
    yield Case("nested/arrays 10 deep", 3, deep)
    both: Schema = WORD
    for _ in range(4):
        both = closed({"items": array(both, 1, 1)})
    yield Case("nested/arrays and objects in turns", 3, both)
