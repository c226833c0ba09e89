"""JSON schemas of what a model may write when it has to call a tool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_DATA = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are not schemas
_BY_NAME = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)  # names to schemas


def calls_schema(functions: Sequence[tuple[str, dict[str, Any] | None]], *, parallel: bool) -> dict[str, Any]:
    """A list of at least one call, each an object of a function's name and its parameters.

    Args:
        functions: names and the schemas of their parameters.
        parallel: whether more than one call may stand in the list.
    """
    definitions: dict[str, Any] = {}
    forms = []
    for number, (name, parameters) in enumerate(functions):
        key = f"parameters_{number}"
        definitions[key] = _moved(parameters or _ANY_OBJECT, f"#/$defs/{key}")
        members = {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{key}"}}
        forms.append(
            {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}
        )
    limit = {} if parallel else {"maxItems": 1}
    items = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {"type": "array", "minItems": 1, **limit, "items": items, "$defs": definitions}


def arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of one function."""
    return parameters or _ANY_OBJECT


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
