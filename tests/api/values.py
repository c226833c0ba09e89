"""Values for every place of a request, wrong ones of every kind, made from the schema that /openapi.json shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

MAX_DEPTH = 12  # of places: schemas may contain themselves
UNKNOWN = "no_such_field"
OVERFLOW = "@1e400@"  # stands for a number that Python's floats cannot hold, and JSON can
NO_JSON = object()  # stands for what JSON cannot hold: no schema with a type accepts it
MAX_ITEMS = 10_000  # more take seconds to judge
KEY = "5"  # of objects that may have any key: logit_bias has token ids

Schema = dict[str, Any]
Path = tuple[str | int, ...]
Inside = tuple[Path, Schema, Callable[[Any], Any]]


def nested(depth: int) -> list[Any]:
    return [] if depth == 0 else [nested(depth - 1)]


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.5, 5.0),
    *(2**31, 2**63, 2**64, 2**80, -(2**80), 1e308, math.nan, math.inf, -math.inf, OVERFLOW),
    *("", "x", "5", "\x00", "x" * 5000),
    *([], [None], [[]], [1], [-1], ["x"], ["x", "x"], [{}], nested(50)),
    *({}, {"x": 1}, {"type": "x"}, {KEY: None}),
)


@dataclass(frozen=True)
class Place:
    """Somewhere in a request.

    Attributes:
        path: names of fields and numbers of items.
        put: the whole body with a value here.
        inside: of what is judged as a whole, the path, the schema, and what a value here makes of it. An array that may
            be one of several kinds is such a whole: what is wrong with an item depends on the other kinds.
    """

    path: Path
    schema: Schema
    put: Callable[[Any], Any]
    inside: Inside

    @property
    def param(self) -> str:
        """The name that an error has, or that its own begins with."""
        return ".".join(map(str, self.inside[0]))


class Schemas:
    """The schemas of one document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._components = document["components"]

    def accepts(self, schema: Schema, value: Any) -> bool:
        """Whether the document allows a value."""
        whole = {"components": self._components, **schema}
        return bool(Draft202012Validator(whole).is_valid(_without_non_finite(value)))

    def allows(self, place: Place, value: Any) -> bool:
        """Whether the document allows a value in a place."""
        _, schema, make = place.inside
        return self.accepts(schema, make(value))

    def places(self, schema: Schema, base: dict[str, Any]) -> Iterator[Place]:
        """Every place inside a body that ``base``, a right one, is changed to."""
        whole = Place((), schema, lambda body: body, ((), schema, lambda body: body))
        for variant in self._variants(schema):
            if self.accepts(variant, base):
                yield from self._inner(variant, base, whole, None)

    def values(self, schema: Schema) -> Iterator[Any]:
        """Odd values of all kinds, and those that lie just outside of the schema's bounds."""
        yield from ODD
        for variant in self._variants(schema):
            if "maxLength" in variant:
                yield "x" * (variant["maxLength"] + 1)
            if "maximum" in variant:
                yield variant["maximum"] + 1
            if "minimum" in variant:
                yield variant["minimum"] - 1
            if "exclusiveMinimum" in variant:
                yield variant["exclusiveMinimum"]
            if variant.get("maxItems", MAX_ITEMS) < MAX_ITEMS:
                yield [self.example(variant.get("items", {}))] * (variant["maxItems"] + 1)
            if "maxProperties" in variant:
                example = self.example(variant.get("additionalProperties", {}))
                yield {str(key): example for key in range(variant["maxProperties"] + 1)}

    def example(self, schema: Schema) -> Any:
        """A small value that the schema allows."""
        schema = next(iter(self._variants(schema)), {})
        if "const" in schema or "enum" in schema:
            return schema["const"] if "const" in schema else schema["enum"][0]
        kind = schema.get("type")
        if kind == "object":
            return {name: self.example(schema["properties"][name]) for name in schema.get("required", ())}
        if kind == "array":
            return [self.example(schema.get("items", {}))] * schema.get("minItems", 0)
        return {"string": "x", "integer": max(1, schema.get("minimum", 1)), "number": 0.5, "boolean": True}.get(kind)

    def _place(
        self, path: Path, schema: Schema, put: Callable[[Any], Any], inside: Inside | None = None
    ) -> Iterator[Place]:
        place = Place(path, schema, put, inside or (path, schema, lambda value: value))
        yield place
        variants = self._variants(schema)
        whole = place.inside if inside or sum("items" in variant for variant in variants) > 1 else None
        if len(path) < MAX_DEPTH:
            for variant in variants:
                yield from self._inner(variant, self.example(variant), place, whole)

    def _inner(self, schema: Schema, base: Any, place: Place, whole: Inside | None) -> Iterator[Place]:
        """The places in a value of this place that has this schema."""
        if "items" in schema and schema.get("maxItems") != 0:
            inside = whole and (whole[0], whole[1], _then(_in_list, whole[2]))
            yield from self._place((*place.path, 0), schema["items"], _then(_in_list, place.put), inside)
        fields = dict(schema.get("properties", {}))
        others = schema.get("additionalProperties")
        if isinstance(others, dict):
            fields[KEY] = others
        elif others is False:
            fields[UNKNOWN] = False
        for name, field in fields.items():
            set_field = _setter(base, name)
            inside = whole and (whole[0], whole[1], _then(set_field, whole[2]))
            yield from self._place((*place.path, name), _as_object(field), _then(set_field, place.put), inside)

    def _variants(self, schema: Schema) -> list[Schema]:
        """What a value may be, null aside, without references."""
        schema = self._resolved(schema)
        options = schema.get("anyOf") or schema.get("oneOf")
        if options is None:
            return [] if schema.get("type") == "null" else [schema]
        return [variant for option in options for variant in self._variants(option)]

    def _resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._components["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema


def _as_object(schema: Schema | bool) -> Schema:
    return {"not": {}} if schema is False else {} if schema is True else schema


def _setter(base: dict[str, Any], name: str) -> Callable[[Any], Any]:
    return lambda value: {**base, name: value}


def _in_list(value: Any) -> Any:
    return [value]


def _then(first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: second(first(value))


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(each) for each in value]
    return NO_JSON if value == OVERFLOW or (isinstance(value, float) and not math.isfinite(value)) else value


def written(body: Any) -> bytes:
    """JSON as a client without manners may send it: NaN, Infinity, lone surrogates."""
    return json.dumps(body).replace(f'"{OVERFLOW}"', "1e400").encode("ascii")
