"""JSON schemas of what a model may write when it has to call a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DATA = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are not schemas
_BY_NAME = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)  # names to schemas


def calls_schema(functions: Mapping[str, dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """A list of at least one call, each an object of a function's name and its parameters.

    Args:
        functions: the schema of each one's arguments, by name.
        parallel: whether more than one call may stand in the list.
    """
    call = call_schema(functions, "parameters")
    definitions = call.pop("$defs")
    limit = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": call, "$defs": definitions}


def call_schema(functions: Mapping[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """One call.

    Args:
        functions: the schema of each one's arguments, by name.
        key: what the arguments are called.
    """
    definitions: dict[str, Any] = {}
    forms = []
    for number, (name, schema) in enumerate(functions.items()):
        place = f"parameters_{number}"
        definitions[place] = _moved(schema, f"#/$defs/{place}")
        members = {"name": {"const": name}, key: {"$ref": f"#/$defs/{place}"}}
        forms.append(
            {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}
        )
    return {**(forms[0] if len(forms) == 1 else {"anyOf": forms}), "$defs": definitions}


def arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of one function, an object; one that says nothing of parameters has none, as OpenAI defines it."""
    return {"type": "object", **(parameters or {"properties": {}, "additionalProperties": False})}


def _moved(schema: Any, root: str) -> Any:
    """A schema that will stand at ``root`` of another one: references into itself go on leading there."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in _BY_NAME and isinstance(value, dict):
            moved[key] = {name: _moved(each, root) for name, each in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, root)
    return moved
