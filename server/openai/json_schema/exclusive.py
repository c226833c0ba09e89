"""Branches of a oneOf that exclude each other, so that it means what anyOf means, which the compiler can enforce.

It sees that by itself where branches are written out; behind references, as libraries of data models write tagged
unions, it does not look.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from server.openai.json_schema.endless import Place

MAX_BRANCHES = 64  # every pair of them is compared


def exclusive(branches: Sequence[Place], schemas: Mapping[Place, Any], targets: Mapping[Place, Place]) -> bool:
    """Whether no value can satisfy two of the branches: by their types, or by a tag, a text that each requires."""
    if len(branches) > MAX_BRANCHES:
        return False
    resolved = [_resolved(place, targets) for place in branches]
    if not all(isinstance(schemas[place], dict) for place in resolved):
        return False
    tags = [_tags(place, schemas, targets) for place in resolved]
    types = [_types(schemas[place]) for place in resolved]
    return all(
        types[one].isdisjoint(types[other]) or any(tags[one][name].isdisjoint(tags[other][name]) for name in shared)
        for one, other in itertools.combinations(range(len(resolved)), 2)
        for shared in [tags[one].keys() & tags[other].keys()]
    )


def _resolved(place: Place, targets: Mapping[Place, Place]) -> Place:
    """Where a schema's references lead: what stands there holds for it, whatever else does."""
    seen = {place}
    while place in targets and targets[place] not in seen:
        place = targets[place]
        seen.add(place)
    return place


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """Types that fit, at most; an integer is a number, too."""
    given = schema.get("type")
    if given is None:
        return frozenset({"array", "boolean", "null", "number", "object", "string"})
    names = given if isinstance(given, list) else [given]
    return frozenset("number" if name == "integer" else name for name in names)


def _tags(place: Place, schemas: Mapping[Place, Any], targets: Mapping[Place, Place]) -> dict[str, frozenset[str]]:
    """Required properties of what must be an object whose values are among some texts."""
    schema = schemas[place]
    if _types(schema) != {"object"}:
        return {}
    tags: dict[str, frozenset[str]] = {}
    for name in schema.get("required", ()):
        found = schemas.get(_resolved((*place, "properties", name), targets))
        if isinstance(found, dict):
            values = [found["const"]] if "const" in found else found.get("enum", [None])
            if all(isinstance(value, str) for value in values):
                tags[name] = frozenset(values)
    return tags
