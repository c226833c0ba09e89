"""A schema of the corpus, and the words that the families are written with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]

PROMPT = "import json\n\nanswer = json.loads('''"


@dataclass(frozen=True)
class Case:
    """One schema. Most of them bound their output, so that an answer ends however a model rambles."""

    name: str
    level: int  # of difficulty, 1 to 6
    schema: Schema
    prompt: str = PROMPT

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]


def text(longest: int, least: int = 0, **words: Any) -> Schema:
    return {"type": "string", **({"minLength": least} if least else {}), "maxLength": longest, **words}


def whole(low: int, high: int, **words: Any) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high, **words}


def pattern(expression: str) -> Schema:
    return {"type": "string", "pattern": expression}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def array(items: Schema | bool, most: int, least: int = 0, **words: Any) -> Schema:
    return {"type": "array", "items": items, **({"minItems": least} if least else {}), "maxItems": most, **words}


def closed(properties: dict[str, Any], optional: tuple[str, ...] = (), **words: Any) -> Schema:
    """An object of these properties and no others; all are required but for the optional ones."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
        **words,
    }


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


BOOL: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
DIGIT = whole(0, 9)
WORD = pattern("^[a-z]{1,8}$")
