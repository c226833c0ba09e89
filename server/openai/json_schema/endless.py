"""Schemas that no finite output fits, because they need themselves: ``{"$ref": "#"}``, a list that has no last item."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

Place = tuple[str, ...]  # the tokens of a JSON pointer
_SCALARS = frozenset({"boolean", "integer", "null", "number", "string"})


def endless(schemas: Mapping[Place, Any], parents: Mapping[Place, Place], targets: Mapping[Place, Place]) -> set[Place]:
    """The schemas that can never be satisfied by something finite.

    The least fixed point of "ends if what it cannot do without ends". ``false`` counts as ending: nothing fits it, but
    nothing is begun that could not be finished.

    Args:
        schemas: every schema of a document, parents before children.
        parents: place -> place of the schema around it; not of the root.
        targets: place of a schema with ``$ref`` -> place of what that leads to.
    """
    users: dict[Place, list[Place]] = defaultdict(list)
    for place, target in targets.items():
        users[target].append(place)
    ended: set[Place] = set()
    visited: set[Place] = set()
    pending = deque(reversed(list(schemas)))  # what is inside comes before what is around it
    queued = set(pending)
    while pending:
        place = pending.popleft()
        queued.discard(place)
        visited.add(place)
        if place in ended or not _ends(place, schemas[place], targets, ended):
            continue
        ended.add(place)
        again = [*users[place], parents[place]] if place in parents else users[place]
        for user in again:
            if user in visited and user not in ended and user not in queued:  # the others' turn is still to come
                pending.append(user)
                queued.add(user)
    return set(schemas) - ended


def _ends(place: Place, schema: Any, targets: Mapping[Place, Place], ended: set[Place]) -> bool:
    if isinstance(schema, bool) or "const" in schema or "enum" in schema:
        return True
    if place in targets and targets[place] not in ended:
        return False
    if not all((*place, "allOf", str(i)) in ended for i in range(len(schema.get("allOf", ())))):
        return False
    for word in ("anyOf", "oneOf"):
        if word in schema and not any((*place, word, str(i)) in ended for i in range(len(schema[word]))):
            return False
    types = schema.get("type", "null")
    names = set(types if isinstance(types, list) else [types])
    if names & _SCALARS:
        return True
    return ("object" in names and _object_ends(place, schema, ended)) or (
        "array" in names and _array_ends(place, schema, ended)
    )


def _object_ends(place: Place, schema: Mapping[str, Any], ended: set[Place]) -> bool:
    named = schema.get("properties", {})
    inner = [(*place, "properties", name) for name in schema.get("required", ()) if name in named]
    others = any(name not in named for name in schema.get("required", ()))
    if others and "patternProperties" not in schema and "additionalProperties" in schema:
        inner.append((*place, "additionalProperties"))
    return all(each in ended for each in inner)


def _array_ends(place: Place, schema: Mapping[str, Any], ended: set[Place]) -> bool:
    least, first = schema.get("minItems", 0), len(schema.get("prefixItems", ()))
    inner = [(*place, "prefixItems", str(i)) for i in range(min(least, first))]
    if least > first and "items" in schema:
        inner.append((*place, "items"))
    return all(each in ended for each in inner)
