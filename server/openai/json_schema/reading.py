"""From a client's JSON schema to the source of a grammar, or the first place in it that cannot be promised.

A schema is read whole before anything is compiled. Whatever in it changes which outputs are right is enforced or
refused, with its place as a JSON pointer; what says nothing about the output (titles, descriptions) is left out, so
that the compiler gets only words that it must act on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from decoding.errors import RequestError, nearest
from server.openai.json_schema import keywords
from server.openai.json_schema.endless import Place, endless
from server.openai.json_schema.exclusive import exclusive

MAX_BYTES = 128 * 2**10
MAX_NESTING = 64
MAX_PROPERTIES = 2000
MAX_ENUM_VALUES = 5000
MAX_LEAST = 100_000  # of a least length: no context of a model holds more
_MAX_TOKEN_CHARS = 40
_MAX_POINTER_CHARS = 160
_URI_SIGNS = "!$&'()*+,;=:@~"  # that stand for themselves in a fragment
_NO_DRAFT_4 = "must be a number: drafts since 6 have no true and false here"


def schema_source(schema: Mapping[str, Any], param: str) -> str:
    """The schema as JSON text, with nothing in it that is not enforced.

    Args:
        schema: JSON values as they came; its order is kept, and is the order of properties in the output.
        param: the request field that holds it, for errors.

    Raises:
        RequestError: code invalid_grammar, with the place and the reason; grammar_too_complex over the limits.
    """
    return _Reader(param).source(schema)


class _Reader:
    def __init__(self, param: str) -> None:
        self._param = param
        self._schemas: dict[Place, Any] = {}
        self._parents: dict[Place, Place] = {}
        self._references: dict[Place, str] = {}
        self._properties = 0
        self._enum_values = 0

    def source(self, schema: Mapping[str, Any]) -> str:
        size = len(self._text(schema).encode())
        if size > MAX_BYTES:
            raise self._too_complex(f"the schema has {size} bytes; {MAX_BYTES} are the most")
        cleaned = self._schema(schema, (), None)
        targets = {place: self._target(place, reference) for place, reference in self._references.items()}
        for place, target in targets.items():
            self._schemas[place]["$ref"] = _fragment(target)
        never = endless(self._schemas, self._parents, targets)
        if never:
            place = min(never, key=len)
            raise self._wrong(place, "can never be satisfied: it needs itself, so that no output could end")
        self._spell_times()
        self._open_unions(targets)
        return self._text(cleaned)

    def _open_unions(self, targets: Mapping[Place, Place]) -> None:
        """Write oneOf as anyOf where it means the same, in its place among the other words."""
        kept = {place[: i + 1] for place in targets.values() for i, word in enumerate(place) if word == "oneOf"}
        for place, schema in self._schemas.items():
            if not isinstance(schema, dict) or "oneOf" not in schema or "anyOf" in schema:
                continue
            branches = [(*place, "oneOf", str(i)) for i in range(len(schema["oneOf"]))]
            if (*place, "oneOf") not in kept and exclusive(branches, self._schemas, targets):
                words = {"anyOf" if word == "oneOf" else word: value for word, value in schema.items()}
                schema.clear()
                schema.update(words)

    def _spell_times(self) -> None:
        """Say more exactly what the compiler would take too loosely."""
        for schema in self._schemas.values():
            if isinstance(schema, dict) and schema.get("format") in keywords.TIMES:
                spelled = keywords.TIMES[schema.pop("format")]
                if "pattern" in schema:
                    schema["allOf"] = [*schema.get("allOf", ()), {"pattern": spelled}]
                else:
                    schema["pattern"] = spelled

    def _text(self, value: Any) -> str:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except ValueError:  # NaN, an infinity, an integer of thousands of digits
            raise self._error(f"{self._param}: its numbers must be finite, and not of thousands of digits") from None

    def _schema(self, value: Any, place: Place, parent: Place | None) -> Any:
        if not isinstance(value, bool | dict):
            raise self._wrong(place, "must be a schema: an object, true or false")
        depth = 0 if parent is None else self._depth(parent) + 1
        if depth > MAX_NESTING:
            raise self._too_complex(f"schemas stand more than {MAX_NESTING} deep in each other")
        if parent is not None:
            self._parents[place] = parent
        if isinstance(value, bool):
            self._schemas[place] = value
            return value
        cleaned: dict[str, Any] = {}
        self._schemas[place] = cleaned
        for word, inner in value.items():
            if self._is_enforced(word, inner, place):
                cleaned[word] = self._word(word, inner, place)
        if "$ref" in cleaned:
            self._references[place] = cleaned["$ref"]
        self._check_least(cleaned, place)
        return cleaned

    def _check_least(self, cleaned: Mapping[str, Any], place: Place) -> None:
        """A grammar cannot tell whether a name that it does not know has come before; so it cannot count such names."""
        least = cleaned.get("minProperties", 0)
        if least > 1 and least > len(set(cleaned.get("required", ()))):
            what = "can be 1, or the number of required properties: how often other names come cannot be enforced"
            raise self._wrong((*place, "minProperties"), what)

    def _depth(self, place: Place) -> int:
        depth = 0
        while place in self._parents:
            place, depth = self._parents[place], depth + 1
        return depth

    def _is_enforced(self, word: str, value: Any, place: Place) -> bool:
        """Whether the word goes on to the compiler.

        Raises:
            RequestError: it would have to, and cannot.
        """
        if word in keywords.ENFORCED:
            return True
        if word in keywords.ANNOTATIONS or (word == "$id" and not place):
            return False
        if word in keywords.UNSUPPORTED:
            unsupported = keywords.UNSUPPORTED[word]
            if any(type(value) is type(each) and value == each for each in unsupported.neutral):
                return False
            instead = f"; {unsupported.instead}" if unsupported.instead else ""
            raise self._wrong((*place, word), f"is a keyword that this server cannot enforce{instead}")
        if word == keywords.LAYOUT and not place:
            self._check_layout(value)
            return True
        if word.startswith("x-") and word != keywords.LAYOUT:
            return False
        raise self._wrong((*place, word), f"is no keyword that this server knows: {_like(word)}")

    def _check_layout(self, value: Any) -> None:
        here = (keywords.LAYOUT,)
        if not isinstance(value, dict):
            raise self._wrong(here, "must be an object")
        for option, given in value.items():
            wanted = keywords.LAYOUT_OPTIONS.get(option)
            if wanted is None:
                raise self._wrong(
                    (*here, option), f"is no option here: {nearest(option[:200], keywords.LAYOUT_OPTIONS)}"
                )
            if type(given) is not wanted:
                raise self._wrong((*here, option), "must be a string" if wanted is str else "must be true or false")

    def _word(self, word: str, value: Any, place: Place) -> Any:
        here = (*place, word)
        if word == keywords.LAYOUT:
            return value
        if word in keywords.ONE_SCHEMA:
            if word == "items" and isinstance(value, list):
                raise self._wrong(here, "must be one schema; a list of them is called prefixItems")
            return self._schema(value, here, place)
        if word in keywords.LISTS_OF_SCHEMAS:
            if not isinstance(value, list) or not value:
                raise self._wrong(here, "must be an array with at least one schema")
            return [self._schema(each, (*here, str(i)), place) for i, each in enumerate(value)]
        if word in keywords.MAPS_OF_SCHEMAS:
            if not isinstance(value, dict):
                raise self._wrong(here, "must be an object with a schema for each name")
            self._count_properties(len(value))
            read = {name: self._schema(each, (*here, name), place) for name, each in value.items()}
            if word == "patternProperties":
                return {keywords.without_nul(name): schema for name, schema in read.items()}
            return read
        return self._value(word, value, here)

    def _value(self, word: str, value: Any, here: Place) -> Any:
        form = keywords.VALUES[word]
        if word.startswith("exclusive") and isinstance(value, bool):
            raise self._wrong(here, _NO_DRAFT_4)
        if not form.fits(value):
            raise self._wrong(here, form.words)
        if word == "enum":
            self._enum_values += len(value)
            if self._enum_values > MAX_ENUM_VALUES:
                raise self._too_complex(f"it lists more than {MAX_ENUM_VALUES} values in enums")
        if word.startswith("min") and word != "minimum" and value > MAX_LEAST:
            raise self._too_complex(f"{_pointer(here)} asks for more than {MAX_LEAST}")
        if word == "required":
            self._count_properties(len(value))
        return keywords.without_nul(value) if word == "pattern" else value

    def _count_properties(self, count: int) -> None:
        self._properties += count
        if self._properties > MAX_PROPERTIES:
            raise self._too_complex(f"it has more than {MAX_PROPERTIES} properties and definitions")

    def _target(self, place: Place, reference: str) -> Place:
        here = (*place, "$ref")
        if not reference.startswith("#"):
            raise self._wrong(here, 'leads out of the schema, and nothing is fetched; put it under "$defs"')
        if reference == "#":
            return ()
        if not reference.startswith("#/"):
            raise self._wrong(here, 'must be a JSON pointer such as "#/$defs/name"')
        target = tuple(unquote(token).replace("~1", "/").replace("~0", "~") for token in reference[2:].split("/"))
        if target not in self._schemas:
            raise self._wrong(here, "leads to nothing that is a schema")
        return target

    def _wrong(self, place: Place, what: str) -> RequestError:
        return self._error(f"{self._param}: {_pointer(place)} {what}")

    def _error(self, message: str) -> RequestError:
        return RequestError(f"{message}.", param=self._param, code="invalid_grammar")

    def _too_complex(self, what: str) -> RequestError:
        return RequestError(f"{self._param}: {what}.", param=self._param, code="grammar_too_complex")


def _fragment(place: Place) -> str:
    """A place as a reference, in the one spelling that every reader of URIs takes."""
    return "#" + "".join(f"/{quote(_escaped(token), safe=_URI_SIGNS)}" for token in place)


def _escaped(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")


def _like(word: str) -> str:
    return nearest(word[:200], keywords.ENFORCED)


def _pointer(place: Place) -> str:
    """A place as people write it, of bounded length."""
    tokens = map(_escaped, place)
    shown = "".join(f"/{t if len(t) <= _MAX_TOKEN_CHARS else t[:_MAX_TOKEN_CHARS] + '…'}" for t in tokens)
    if len(shown) > _MAX_POINTER_CHARS:
        shown = f"{shown[: _MAX_POINTER_CHARS // 2]}…{shown[-_MAX_POINTER_CHARS // 2 :]}"
    return f"'#{shown}'"
