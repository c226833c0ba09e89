"""Level 1: one value. Constants, enums, ranges, lengths, patterns, formats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tests.schemas.case import Case, Schema, one_of, pattern, text, whole

CONSTANTS: dict[str, Any] = {
    "word": "yes",
    "empty text": "",
    "sentence": "The quick brown fox jumps over the lazy dog.",
    "quotes and backslash": 'say "hi" \\ and \\n',
    "control characters": "tab\there, line\nthere, nul\u0000, bell\u0007",
    "umlauts": "Größe: 10 µm, naïve café",
    "other scripts": "日本語 русский العربية",
    "emoji": "🙂👩‍👩‍👧‍👦",
    "line separators": "a\u2028b\u2029c\u0085d",
    "negative": -17,
    "large": 9007199254740991,
    "fraction": 2.5,
    "true": True,
    "null": None,
    "array": [1, "two", None, [True, {}]],
    "object": {"a": {"b": [1, 2]}, "c": "d"},
}

ENUMS: dict[str, list[Any]] = {
    "of one": ["only"],
    "of two": ["on", "off"],
    "of colours": ["red", "green", "blue", "cyan", "magenta", "yellow", "black"],
    "that share their beginning": ["test", "tests", "tested", "tester", "testing", "testament", "testimony"],
    "one the start of another": ["a", "aa", "aaa", "aaaa", "aaaaa"],
    "of integers": [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, -1],
    "of all types": ["text", 7, True, None, [1], {"k": "v"}],
    "of statuses": [200, 201, 204, 301, 302, 304, 400, 401, 403, 404, 409, 418, 422, 429, 500, 502, 503, 504],
    "of non-ASCII words": ["grün", "größer", "ça va", "niño", "Ω", "π", "中文", "ﬁ"],
    "of words that need escapes": ['"', "\\", "\\\\", "\n", "\t\r", '"quoted"', "a\u0000b", "\u001f"],
    "of objects": [{"x": 1, "y": 2}, {"x": 2, "y": 1}, {"x": 0, "y": 0}],
    "of arrays": [[], [0], [0, 0], [[0]], ["0"]],
    "of 300 names": [f"item_{i:03d}_{'abcdefg'[i % 7] * (i % 5)}" for i in range(300)],
    "of 1000 names": [f"{['north', 'south', 'east', 'west'][i % 4]}-{i * 7919 % 10007}" for i in range(1000)],
}

# (low, high, more)
INTEGERS: list[tuple[int, int, dict[str, Any]]] = [
    (0, 0, {}),
    (0, 9, {}),
    (-5, 5, {}),
    (0, 255, {}),
    (10, 99, {}),
    (100, 999, {}),
    (-1000, -1, {}),
    (0, 65535, {}),
    (-32768, 32767, {}),
    (0, 2147483647, {}),
    (-9007199254740991, 9007199254740991, {}),
    (0, 100, {"multipleOf": 5}),
    (-70, 70, {"multipleOf": 7}),
    (0, 100000, {"multipleOf": 1000}),
    (1, 10, {"exclusiveMinimum": 3}),
    (-3, 30, {"exclusiveMaximum": 2, "exclusiveMinimum": -2}),
]

NUMBERS: list[Schema] = [
    {"minimum": 0, "maximum": 1, "multipleOf": 0.5},
    {"minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"minimum": -1, "maximum": 1, "multipleOf": 0.1},
    {"minimum": 0, "maximum": 100, "multipleOf": 0.01},
    {"minimum": -273.15, "maximum": 1000, "multipleOf": 0.05},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.125},
    {"minimum": 1.5, "maximum": 2.5, "multipleOf": 0.001},
    {"minimum": 10, "exclusiveMaximum": 20, "multipleOf": 2.5},
]

LENGTHS = [(0, 0), (1, 1), (0, 3), (2, 4), (5, 5), (0, 16), (10, 20), (32, 32), (1, 60)]

PATTERNS: dict[str, str] = {
    "class of digits": r"^\d{3}-\d{4}$",
    "identifier": "^[A-Za-z_][A-Za-z0-9_]{0,15}$",
    "hexadecimal colour": "^#[0-9a-fA-F]{6}$",
    "semantic version": r"^(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]{0,2})$",
    "version with a suffix": r"^v[0-9]\.[0-9]{1,2}(-(alpha|beta|rc)\.[0-9])?$",
    "day": r"^(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$",
    "address": r"^((25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})$",
    "hash": "^[0-9a-f]{40}$",
    "alternatives": "^(GET|POST|PUT|PATCH|DELETE)$",
    "price": r"^\$[0-9]{1,3}(,[0-9]{3}){0,2}\.[0-9]{2}$",
    "path": "^(/[a-z0-9]{1,8}){1,4}$",
    "file": r"^[a-z]{1,8}\.(py|txt|json|md)$",
    "quotes": '^"[^"\\\\]{1,5}"$',
    "backslashes": r"^C:(\\[A-Z][a-z]{0,5}){1,3}$",
    "optional parts": "^a?b?c?d?e?f$",
    "lazy repeats": "^x{1,5}?y{2,3}?$",
    "non-ASCII": "^[äöüß]{1,6}$",
    "range of letters from afar": "^[α-ω]{1,4}$",
    "negated class": "^[^a-zA-Z0-9]{1,3}$",
    "no quotes": '^[^"]{1,9}$',
    "no quotes and backslashes": '^[^"\\\\\n]{2,9}$',
    "word characters": r"^\w{1,10}$",
    "phone": r"^\+[1-9][0-9]{1,2} \(?[0-9]{2,3}\)? [0-9]{3,4}-[0-9]{3,4}$",
    "chess move": "^([KQRBN]?[a-h]?[1-8]?x?[a-h][1-8](=[QRBN])?[+#]?|O-O(-O)?)$",
    "roman number": "^M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})$",
}

# formats whose texts are of bounded length, and those that are not with a bound
FORMATS: list[Schema] = [
    {"format": "date"},
    {"format": "ipv4"},
    {"format": "uuid"},
    {"format": "ipv6"},
    {"format": "time", "maxLength": 20},
    {"format": "date-time", "maxLength": 30},
    {"format": "duration", "maxLength": 12},
    {"format": "email", "maxLength": 30},
    {"format": "hostname", "maxLength": 20},
    {"format": "uri", "maxLength": 40},
]


def cases() -> Iterator[Case]:
    yield Case("type/boolean", 1, {"type": "boolean"})
    yield Case("type/null", 1, {"type": "null"})
    for name, value in CONSTANTS.items():
        yield Case(f"const/{name}", 1, {"const": value})
    for name, values in ENUMS.items():
        yield Case(f"enum/{name}", 1, one_of(*values))
    for low, high, more in INTEGERS:
        words = "".join(f" {word} {value}" for word, value in more.items())
        yield Case(f"integer/{low} to {high}{words}", 1, whole(low, high, **more))
    for each in NUMBERS:
        yield Case(
            f"number/{' '.join(f'{word} {value}' for word, value in each.items())}", 1, {"type": "number", **each}
        )
    for least, longest in LENGTHS:
        yield Case(f"length/{least} to {longest}", 1, text(longest, least))
    for name, expression in PATTERNS.items():
        yield Case(f"pattern/{name}", 1, pattern(expression))
    for each in FORMATS:
        yield Case(f"format/{each['format']}", 1, {"type": "string", **each})
    yield from _together()


def _together() -> Iterator[Case]:
    """Several words about one value, and types in a list."""
    yield Case("scalar/pattern with lengths", 1, text(6, 4, pattern="^[ab]+$"))
    yield Case("scalar/pattern that is searched", 1, text(8, pattern="42"))
    yield Case("scalar/pattern open to the left", 1, text(9, pattern=r"\.py$"))
    yield Case("scalar/pattern open to the right", 1, text(9, pattern="^def "))
    yield Case("scalar/enum cut by its type", 1, {"type": "integer", "enum": [1, "1", 2, None, 3]})
    yield Case("scalar/enum cut by a length", 1, {"enum": ["a", "ab", "abc", "abcd"], "type": "string", "minLength": 3})
    yield Case("scalar/enum cut by a range", 1, {"enum": list(range(20)), "type": "integer", "minimum": 17})
    yield Case("scalar/nullable integer", 1, {"type": ["integer", "null"], "minimum": 0, "maximum": 99})
    yield Case("scalar/text or truth", 1, {"type": ["string", "boolean"], "maxLength": 5})
    yield Case("scalar/words for other types", 1, {"type": "boolean", "maxLength": 3, "minimum": 5, "maxItems": 1})
    three = {"type": ["integer", "string", "null"], "minimum": -9, "maximum": 9, "pattern": "^(in|out)$"}
    yield Case("scalar/three types", 1, three)
    yield Case("scalar/annotated", 1, {"title": "T", "description": "D", "default": 3, "examples": [1], **whole(1, 3)})
    yield Case("scalar/rounded pi", 1, {"type": "number", "const": round(math.pi, 4)})
