"""Several right values at once, made from /openapi.json: whatever they come to, the answer is one that it shows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from server.app import build_app
from server.openapi import document
from server.settings import ServerSettings
from tests.api.asgi import Answer, post
from tests.api.harness import fake, saying, tokenizer
from tests.api.test_every_value import RIGHT, SCHEMAS, body_schema, names_a_place, operations
from tests.api.values import Place, written

MOST = 4  # fields beside those of a right request
APP = build_app(fake(saying("a", " b")), tokenizer(), ServerSettings(("demo",)))


def right_values(place: Place) -> list[Any]:
    values = [SCHEMAS.example(place.schema), *SCHEMAS.values(place.schema)]
    return [value for value in values if SCHEMAS.allows(place, value)]


def fields(path: str, body: dict[str, Any]) -> dict[str, list[Any]]:
    """Right values of each field of a request."""
    places = [place for place in SCHEMAS.places(body_schema(path), body) if len(place.path) == 1]
    found = {str(place.path[0]): right_values(place) for place in places}
    return {name: values for name, values in found.items() if values}


def bodies(path: str, body: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    known = fields(path, body)
    names = st.lists(st.sampled_from(sorted(known)), max_size=MOST, unique=True)
    chosen = names.flatmap(lambda some: st.fixed_dictionaries({name: st.sampled_from(known[name]) for name in some}))
    return chosen.map(lambda more: {**body, **more})


def payloads(answer: Answer) -> list[Any]:
    if answer.media_type != "text/event-stream":
        return [answer.json()]
    lines = answer.body.decode("ascii").split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def faults(path: str, body: dict[str, Any], answer: Answer) -> Iterator[str]:
    """What the document does not show."""
    shown = operations()[path]["responses"].get(str(answer.status))
    if shown is None or answer.status >= 500:
        yield f"status {answer.status}"
        return
    schema = shown["content"][answer.media_type]["schema"]
    validator = Draft202012Validator({"components": document()["components"], **schema.get("x-event", schema)})
    for payload in payloads(answer):
        yield from (f"{error.json_path}: {error.message}" for error in validator.iter_errors(payload))
    if answer.status == 400 and not names_a_place(answer.json()["error"]["param"] or "no.name", body):
        yield f"named {answer.json()['error']['param']}"


@pytest.mark.parametrize(("path", "body"), RIGHT)
def test_right_values_together_are_answered_as_shown(path: str, body: dict[str, Any]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(bodies(path, body))
    def check(asked: dict[str, Any]) -> None:
        answer = asyncio.run(post(APP, path, written(asked)))
        assert list(faults(path, asked, answer)) == [], asked

    check()
