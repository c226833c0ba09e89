"""The corpus itself: as many as it says, no two alike, each a schema, and each one that the server takes."""

from __future__ import annotations

import json

import pytest
from jsonschema.validators import Draft202012Validator, validator_for

from benchmarks.schema_judge import complaint
from server.openai.json_schema.reading import schema_source
from tests.schemas.case import Schema
from tests.schemas.corpus import FILE, SIZE, lines, load

CASES = load()


def test_the_file_is_what_the_families_write() -> None:
    assert FILE.read_text(encoding="utf-8").splitlines() == lines()


def test_there_are_as_many_as_said_and_no_two_alike() -> None:
    assert len(CASES) == SIZE
    assert len({case.name for case in CASES}) == SIZE
    assert len({json.dumps(case.schema, sort_keys=True) for case in CASES}) == SIZE
    assert [case.level for case in CASES] == sorted(case.level for case in CASES)


@pytest.mark.parametrize("level", range(1, 7))
def test_each_is_a_schema(level: int) -> None:
    for case in CASES:
        if case.level == level:
            validator_for(case.schema, default=Draft202012Validator).check_schema(case.schema)


def test_reading_leaves_what_is_enforced() -> None:
    """What is left out says nothing, or is said in other words."""
    left_out = {"$schema", "$id", "title", "description", "default", "examples", "uniqueItems", "format"}
    left_out |= {"oneOf", "discriminator"}
    for case in CASES:
        source = json.loads(schema_source(case.schema, "guided_json"))
        assert set(case.schema) - set(source) <= left_out


@pytest.mark.parametrize(
    ("text", "schema", "fits"),
    [
        ("0.07", {"type": "number", "multipleOf": 0.01}, True),
        ("0.075", {"type": "number", "multipleOf": 0.01}, False),
        ("[1,", {}, False),
        ("NaN", {}, False),
        ('"2024-02-30"', {"format": "date"}, False),
        ("2.5", {"const": 2.5}, True),
    ],
)
def test_the_judge(text: str, schema: Schema, fits: bool) -> None:
    assert (complaint(text, schema) is None) is fits
