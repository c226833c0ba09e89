"""The words of JSON Schema (draft 2020-12): what is enforced, what says nothing, what cannot be promised."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

# Formats that are enforced. In draft 2020-12 others say nothing; but who writes one means it, so that it is refused.
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")

ONE_SCHEMA = frozenset({"items", "additionalProperties"})
LISTS_OF_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})

# Words that change nothing about which outputs are right; those that begin with "x-" are taken as such, too.
ANNOTATIONS = frozenset(
    {"$schema", "$anchor", "$dynamicAnchor", "$comment", "title", "description", "default", "example", "examples"}
    | {"deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding"}
    | {"discriminator"}  # OpenAPI's hint at which branch of a oneOf it is; the oneOf itself is enforced
)


@dataclass(frozen=True)
class Form:
    """What a word's value must look like."""

    fits: Callable[[Any], bool]
    words: str


def is_cut_off(expression: str) -> bool:
    """Whether a regular expression ends with a backslash that escapes nothing; compilers overlook it."""
    return (len(expression) - len(expression.rstrip("\\"))) % 2 == 1


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and not is_cut_off(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_COUNT = Form(_is_count, "must be a whole number of at least 0")
_NUMBER = Form(_is_number, "must be a finite number")

VALUES: Mapping[str, Form] = {
    "type": Form(_is_type, f"must be one of {', '.join(TYPES)}, or an array of these"),
    "enum": Form(lambda value: isinstance(value, list) and bool(value), "must be an array with at least one value"),
    "const": Form(lambda value: True, ""),
    "$ref": Form(lambda value: isinstance(value, str), "must be a string"),
    "required": Form(_are_names, "must be an array of strings"),
    "pattern": Form(_is_pattern, "must be a string with a whole regular expression"),
    "format": Form(lambda value: isinstance(value, str) and value in FORMATS, f"must be one of {', '.join(FORMATS)}"),
    "multipleOf": Form(lambda value: _is_number(value) and value > 0, "must be a finite number above 0"),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
}


@dataclass(frozen=True)
class Unsupported:
    """A word whose meaning no grammar here can hold."""

    neutral: tuple[Any, ...] = ()  # values that ask for nothing
    instead: str = ""


UNSUPPORTED: Mapping[str, Unsupported] = {
    "not": Unsupported(),
    "if": Unsupported(),
    "then": Unsupported(),
    "else": Unsupported(),
    "contains": Unsupported(),
    "minContains": Unsupported(),
    "maxContains": Unsupported(),
    "propertyNames": Unsupported((True, {}), "patternProperties with additionalProperties: false says it of names"),
    "uniqueItems": Unsupported((False,), "leave it out, and drop what comes twice"),
    "additionalItems": Unsupported((), "in draft 2020-12 it is called items, beside prefixItems"),
    "dependencies": Unsupported(({},)),
    "dependentRequired": Unsupported(({},)),
    "dependentSchemas": Unsupported(({},)),
    "unevaluatedItems": Unsupported((True, {})),
    "unevaluatedProperties": Unsupported((True, {}), "additionalProperties: false closes an object"),
    "contentSchema": Unsupported(),
    "nullable": Unsupported((False,), 'write "type": ["string", "null"]'),
    "$dynamicRef": Unsupported((), "use $ref"),
    "$recursiveRef": Unsupported((), "use $ref"),
}

ENFORCED = (*VALUES, *sorted(ONE_SCHEMA | LISTS_OF_SCHEMAS | MAPS_OF_SCHEMAS))

# At the root of a schema: how the compiler is to set its signs. Its other options switch checks off.
LAYOUT = "x-guidance"
LAYOUT_OPTIONS: Mapping[str, type] = {
    "item_separator": str,
    "key_separator": str,
    "whitespace_flexible": bool,
    "whitespace_pattern": str,
}

# The compiler takes RFC 3339 at its word, where there is a year 0000, any minute may have a second 60 and fractions
# have no end; hardly any reader takes all that. So days and times are spelled out as everybody reads them.
_LEAP_YEAR = "[1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00"
_MONTH_AND_DAY = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DAY = f"([1-9][0-9]{{3}}-({_MONTH_AND_DAY})|({_LEAP_YEAR})-02-29)"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
TIMES: Mapping[str, str] = {"date": f"^{_DAY}$", "time": f"^{_TIME}$", "date-time": f"^{_DAY}T{_TIME}$"}

_NEGATED = re.compile(r"(\\.)|(\[\^\]?)", re.DOTALL)


def without_nul(expression: str) -> str:
    """The expression with no NUL in its negated classes.

    llguidance (1.9.1, where derivre quotes sets of bytes for JSON) takes a class that has every control character for
    one that has quotes and backslashes, too: ``[^"]`` would match a quote. Without NUL it looks closer.
    """
    return _NEGATED.sub(lambda found: found[1] or f"{found[2]}\\x00", expression)
