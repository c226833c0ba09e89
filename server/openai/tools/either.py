"""Outputs that are an answer of a form or calls, as the model chooses: grammars in llguidance's variant of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from decoding.request import Grammar
from server.openai.tools import hermes
from server.openai.tools.schema import call_schema

# as the library writes JSON for a schema alone, and as models write calls
_ANSWER_LAYOUT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_CALL_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LAYOUT = "x-guidance"

Functions = Mapping[str, dict[str, Any]]  # the schema of each one's arguments, by name


def tagged(answer: Grammar, functions: Functions, *, parallel: bool) -> Grammar | None:
    """Calls in Hermes' tags; None: an answer of this kind cannot be one of two things.

    Args:
        parallel: whether there may be several calls.
    """
    call = f'"{hermes.OPEN}\\n" function "\\n{hermes.CLOSE}"'
    return _either(answer, call_schema(functions, "arguments"), call, "\\n" if parallel else None)


def bare(answer: Grammar, functions: Functions, *, parallel: bool) -> Grammar | None:
    """Calls that are objects like the answer, as Llama 3 writes them."""
    return _either(answer, call_schema(functions, "parameters"), "function", "; " if parallel else None)


def _either(answer: Grammar, function: dict[str, Any], call: str, separator: str | None) -> Grammar | None:
    if answer.kind not in ("json_schema", "json_object"):
        return None
    form = json.loads(answer.source) if answer.kind == "json_schema" else {"type": "object"}
    more = "" if separator is None else f' ("{separator}" call)*'
    rules = [
        f"start: answer | call{more}",
        f"call: {call}",
        f"answer: %json {_laid_out(form, _ANSWER_LAYOUT)}",
        f"function: %json {_laid_out(function, _CALL_LAYOUT)}",
    ]
    return Grammar("grammar", "\n".join(rules))


def _laid_out(schema: dict[str, Any], layout: dict[str, Any]) -> str:
    """A schema as JSON; what it says itself about its layout goes before ``layout``."""
    return json.dumps({**schema, _LAYOUT: {**layout, **schema.get(_LAYOUT, {})}}, separators=(",", ":"))
