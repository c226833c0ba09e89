"""Every kind of wrong value in every place of every request, made from /openapi.json: a 400 that names the field.

A field that is added later is tested by itself, and so is an endpoint, once it says what a right request is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.app import build_app
from server.openapi import document
from server.settings import ServerSettings
from tests.api.asgi import Answer, post_all
from tests.api.harness import fake, saying, tokenizer
from tests.api.values import UNKNOWN, Place, Schemas, written

RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", {"input": "x"}),
    ("/tokenize", {"prompt": "x"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}),
    ("/detokenize", {"tokens": [5]}),
]
STREAMING = [(path, body) for path, body in RIGHT if path.startswith("/v1/")]
SURROGATES = ("\ud800", "x\udfff", "\ud800\ud800")
SCHEMAS = Schemas(document())


def operations() -> dict[str, dict[str, Any]]:
    return {path: methods["post"] for path, methods in document()["paths"].items() if "post" in methods}


def body_schema(path: str) -> dict[str, Any]:
    schema: dict[str, Any] = operations()[path]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def answers(path: str, bodies: list[bytes]) -> list[Answer]:
    app = build_app(fake(saying("y")), tokenizer(), ServerSettings(("demo",)))
    return post_all(app, [(path, body) for body in bodies])


def names_a_place(param: str, body: Any) -> bool:
    """Whether every part of a name but the last is in the body: no parser's internals are."""
    *parents, _ = param.split(".")
    for part in parents:
        if isinstance(body, list) and part.isdigit() and int(part) < len(body):
            body = body[int(part)]
        elif isinstance(body, dict) and part in body:
            body = body[part]
        else:
            return False
    return True


def faults(path: str, place: Place, value: Any, answer: Answer) -> Iterator[str]:
    """What is wrong with the answer to ``value`` in ``place``."""
    if str(answer.status) not in operations()[path]["responses"] or answer.status >= 500:
        yield f"status {answer.status}"
        return
    if answer.status == 200:
        if not SCHEMAS.allows(place, value):
            yield "accepted"
        return
    error = answer.json()["error"]
    if set(error) != {"message", "type", "param", "code"} or answer.media_type != "application/json":
        yield f"envelope {error}"
    elif error["param"] is None or not names_a_place(error["param"], place.put(value)):
        yield f"named {error['param']}"
    elif not SCHEMAS.allows(place, value):
        inside = error["param"] == place.param or error["param"].startswith(place.param + ".")
        if not inside or answer.status != 400:
            yield f"status {answer.status}, named {error['param']}"
        elif place.path[-1] == UNKNOWN and error["code"] != "unknown_parameter":
            yield f"code {error['code']}"


def test_every_endpoint_says_what_a_right_request_is() -> None:
    assert {path for path, _ in RIGHT} == set(operations())
    for path, body in RIGHT:
        assert SCHEMAS.accepts(body_schema(path), body)
        assert [answer.status for answer in answers(path, [written(body)])] == [200]


@pytest.mark.parametrize(("path", "body"), RIGHT)
def test_wrong_values_are_refused_by_name(path: str, body: dict[str, Any]) -> None:
    check(path, body, 1)


@pytest.mark.parametrize(("path", "body"), STREAMING)
def test_wrong_values_in_a_stream_are_refused_by_name(path: str, body: dict[str, Any]) -> None:
    # a stream's own road begins behind the checks of single fields: it is tried with a few values each
    check(path, {**body, "stream": True}, 7)


def check(path: str, body: dict[str, Any], every: int) -> None:
    """Try every so manyth of the values of all places."""
    places = list(SCHEMAS.places(body_schema(path), body))
    cases = [(place, value) for place in places for value in list(SCHEMAS.values(place.schema))[::every]]
    assert len(cases) > 30
    got = answers(path, [written(place.put(value)) for place, value in cases])
    wrong = [
        f"{place.path} = {value!r:.60}: {fault}"
        for (place, value), answer in zip(cases, got, strict=True)
        for fault in faults(path, place, value, answer)
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize(("path", "body"), RIGHT)
def test_lone_surrogates_are_no_json(path: str, body: dict[str, Any]) -> None:
    texts = [place for place in SCHEMAS.places(body_schema(path), body) if SCHEMAS.allows(place, "x")]
    assert texts
    got = answers(path, [written(place.put(text)) for place in texts for text in SURROGATES])
    assert {(answer.status, answer.json()["error"]["code"]) for answer in got} == {(400, "invalid_json")}


@pytest.mark.parametrize(("path", "body"), STREAMING)
def test_of_two_fields_of_one_name_one_counts(path: str, body: dict[str, Any]) -> None:
    begin = written(body)[:-1]
    twice = begin + b', "top_k": 1, "top_k": 0.5}'
    once = begin + b', "top_k": 0.5, "top_k": 1}'
    assert sorted(answer.status for answer in answers(path, [twice, once])) == [200, 400]


def test_the_places_and_values_are_those_of_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
            "b": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 3},
        },
        "additionalProperties": False,
    }
    schemas = Schemas({"components": {"schemas": {"S": schema}}})
    found = {
        ".".join(map(str, place.path)): place for place in schemas.places({"$ref": "#/components/schemas/S"}, {"a": 1})
    }
    assert set(found) == {"a", "b", "b.0", UNKNOWN}
    assert found["b.0"].put("y") == {"a": 1, "b": ["y"]}
    assert {10, -1} <= {value for value in schemas.values(found["a"].schema) if isinstance(value, int)}
    assert "xxx" in schemas.values(found["b.0"].schema)
    assert ["x"] * 4 in schemas.values(found["b"].schema)
    assert not schemas.allows(found[UNKNOWN], 1)
    assert not schemas.accepts({"type": "number"}, float("nan"))
    assert schemas.accepts({}, float("nan"))


def test_an_item_of_an_array_of_one_of_several_kinds_is_judged_with_the_array() -> None:
    kinds = [{"type": "array", "items": {"type": kind}} for kind in ("integer", "string")]
    schema = {"type": "object", "properties": {"a": {"anyOf": kinds}}}
    schemas = Schemas({"components": {"schemas": {}}})
    items = [place for place in schemas.places(schema, {}) if place.path == ("a", 0)]
    assert [place.param for place in items] == ["a", "a"]
    assert all(schemas.allows(place, 1) and schemas.allows(place, "x") for place in items)
    assert not any(schemas.allows(place, None) for place in items)
