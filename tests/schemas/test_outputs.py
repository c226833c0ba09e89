"""Every schema on a real model: complete, valid, and the same text whatever drafts.

Sixty of them in CI, from all families; SACCADE_SCHEMAS=300 (``make test-schemas``) runs all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks.schema_judge import complaint
from decoding.engine import Engine
from decoding.request import GenerateRequest, Grammar, SamplingParams
from server.openai.json_schema.reading import schema_source
from tests.engines import ROOT
from tests.schemas.case import Case
from tests.schemas.corpus import SIZE, load, spread

COUNT = int(os.environ.get("SACCADE_SCHEMAS", "60"))
CASES = load() if COUNT >= SIZE else spread(COUNT)
TARGET = str(ROOT / "demo/target")
SPECULATE = (f"draft={ROOT / 'demo/draft'}", "ngram")
MAX_TOKENS = 600


@dataclass
class Answer:
    """What came out for one request."""

    tokens: list[int]
    reason: str = ""
    steps: int = 0


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    engine = Engine.load(TARGET, num_pages=1600, plan="fixed")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def speculative() -> Iterator[Engine]:
    engine = Engine.load(TARGET, speculate=SPECULATE, num_pages=1600, plan="fixed:nodes=12,depth=8")
    yield engine
    engine.close()


def request(engine: Engine, place: int, case: Case, temperature: float) -> GenerateRequest:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=place)
    grammar = Grammar("json_schema", schema_source(case.schema, case.name))
    return GenerateRequest(case.name, tuple(engine.tokenizer.encode(case.prompt)), params, grammar=grammar)


def answers(engine: Engine, temperature: float) -> dict[str, Answer]:
    """All cases at once, in one engine's batches."""
    found = {case.name: Answer([]) for case in CASES}
    for place, case in enumerate(CASES):
        engine.submit(request(engine, place, case, temperature))
    while engine.has_work:
        for event in engine.step():
            answer = found[event.request_id]
            answer.tokens += event.token_ids
            if event.finish_reason is not None:
                assert event.finish_reason != "error", (event.request_id, event.error)
                assert event.speculation is not None
                answer.reason, answer.steps = event.finish_reason, event.speculation.steps
    engine.check()
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_satisfy_their_schemas_and_drafts_change_nothing(
    plain: Engine, speculative: Engine, temperature: float
) -> None:
    judge, found = answers(plain, temperature), answers(speculative, temperature)
    unfinished = [name for name, answer in judge.items() if answer.reason != "stop"]
    assert not unfinished
    decode = plain.tokenizer.decode
    wrong = {case.name: complaint(decode(judge[case.name].tokens[:-1]), case.schema) for case in CASES}
    assert not {name: why for name, why in wrong.items() if why is not None}
    other = [name for name, answer in found.items() if answer.tokens != judge[name].tokens]
    assert not other
    steps = [sum(answer.steps for answer in each.values()) for each in (judge, found)]
    assert steps[1] < steps[0] / 2, "forced tokens are not drafted"
