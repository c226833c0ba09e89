"""From a request's ``Grammar`` to the text that the library compiles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from decoding.errors import RequestError
from decoding.request import Grammar

MAX_CHOICES = 10_000
# Without white space most of a JSON text is forced, and no model can fill it up with blanks. A schema may ask for
# something else by "x-guidance".
JSON_DEFAULTS = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
JSON_OVERRIDES = {"lenient": False}  # a keyword that is not implemented is an error, whatever the schema says
GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)  # a rule of llama.cpp's grammars; Lark's have a colon
META = frozenset("\\.+*?()|[]{}^$#&-~/")
CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def library_text(grammar: Grammar) -> str:
    """The grammar in the library's own notation; whether it compiles is not known yet.

    Raises:
        RequestError: it cannot be one, with code ``invalid_grammar``.
    """
    return _NOTATIONS[grammar.kind](grammar.source)


def refuse(message: str, code: str = "invalid_grammar") -> NoReturn:
    """Raise the RequestError of a grammar; who knows the request's field puts its name in."""
    raise RequestError(message, param="grammar", code=code)


def _json_object(source: str) -> str:
    return _json_schema('{"type": "object"}')


def _json_schema(source: str) -> str:
    schema = _parsed(source, "JSON schema")
    if schema is True:  # anything goes, which the library knows by another name
        source = "{}"
    elif not isinstance(schema, dict):
        refuse("The JSON schema must be an object.")
    try:
        return str(LLMatcher.grammar_from_json_schema(source, defaults=JSON_DEFAULTS, overrides=JSON_OVERRIDES))
    except (ValueError, UnicodeError) as error:
        refuse(f"The JSON schema cannot be read: {brief(error)}")


def _regex(source: str) -> str:
    return str(LLMatcher.grammar_from_regex(_unanchored(source)))


def _choice(source: str) -> str:
    choices = _parsed(source, "list of choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
        refuse("The choices must be a list of strings with at least one of them.")
    if len(choices) > MAX_CHOICES:
        refuse(f"There are {len(choices)} choices; {MAX_CHOICES} are the most.", "grammar_too_complex")
    return str(LLMatcher.grammar_from_regex("|".join(map(_escaped, dict.fromkeys(choices)))))


def _grammar(source: str) -> str:
    if GBNF.search(source):
        try:
            source = gbnf_to_lark(source)
        except Exception as error:  # the library raises no narrower type
            message = f"The grammar cannot be read as GBNF: {brief(error)}"
            raise RequestError(message, param="grammar", code="invalid_grammar") from error
    return str(LLMatcher.grammar_from_lark(source))


_NOTATIONS: dict[str, Callable[[str], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}


def _parsed(source: str, what: str) -> Any:
    try:
        return json.loads(source)
    except RecursionError:
        refuse(f"The {what} is nested too deeply.", "grammar_too_complex")
    except ValueError as error:
        refuse(f"The {what} is not valid JSON: {brief(error)}")


def _unanchored(regex: str) -> str:
    """Without the anchors around it: the text is matched as a whole anyway, and the library knows none."""
    regex = regex.removeprefix("^")
    if regex.endswith("$"):
        body = regex[:-1]
        if (len(body) - len(body.rstrip("\\"))) % 2 == 0:
            return body
    return regex


def _escaped(text: str) -> str:
    """A regex for exactly this text."""
    return "".join(CONTROL.get(char, "\\" + char if char in META else char) for char in text)


def brief(error: object) -> str:
    """An error's first line, and its reason where the library says one, cut: it repeats what it was given."""
    lines = str(error).strip().splitlines() or ["no reason was given"]
    reason = next((line for line in lines[1:] if line.startswith("error:")), "")
    return " ".join(line if len(line) <= 200 else line[:199] + "…" for line in (lines[0], reason) if line)
