"""Every schema on a real model: complete, valid, and the same text whatever drafts.

``make test-schemas`` sets SACCADE_SCHEMA_SEEDS, for that many texts of each schema at temperature 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from benchmarks.schema_judge import complaint
from decoding.engine import Engine
from decoding.request import GenerateRequest, Grammar, SamplingParams, SpeculationParams
from server.openai.json_schema.reading import schema_source
from tests.engines import ROOT
from tests.schemas.case import Case
from tests.schemas.corpus import load

SEEDS = int(os.environ.get("SACCADE_SCHEMA_SEEDS", "1"))
CASES = load()
TARGET = str(ROOT / "demo/target")
SPECULATE = (f"draft={ROOT / 'demo/draft'}", "ngram")
MAX_TOKENS = 600
PLAIN = SpeculationParams(enabled=False)


@dataclass
class Answer:
    """What came out for one schema and seed."""

    case: Case
    seed: int
    tokens: list[int]
    reason: str = ""
    steps: int = 0

    @property
    def name(self) -> str:
        return f"{self.case.name}, seed {self.seed}"


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


def answers(engine: Engine, temperature: float, speculation: SpeculationParams, seeds: Sequence[int]) -> list[Answer]:
    """All schemas at once, in one engine's batches."""
    found = {str(place): Answer(*each, []) for place, each in enumerate((c, s) for c in CASES for s in seeds)}
    for name, answer in found.items():
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=answer.seed)
        grammar = Grammar("json_schema", schema_source(answer.case.schema, answer.case.name))
        ids = tuple(engine.tokenizer.encode(answer.case.prompt))
        engine.submit(GenerateRequest(name, ids, params, speculation, grammar=grammar))
    while engine.has_work:
        for event in engine.step():
            answer = found[event.request_id]
            answer.tokens += event.token_ids
            if event.finish_reason is not None:
                assert event.speculation is not None
                answer.reason, answer.steps = event.error or event.finish_reason, event.speculation.steps
    engine.check()
    return list(found.values())


@pytest.mark.parametrize(("temperature", "seeds"), [(0.0, 1), (1.0, SEEDS)])
def test_answers_satisfy_their_schemas_and_drafts_change_nothing(
    plain: Engine, speculative: Engine, temperature: float, seeds: int
) -> None:
    judge = answers(plain, temperature, PLAIN, range(seeds))
    drafted = answers(speculative, temperature, SpeculationParams(), range(seeds))
    # what recurs may go on as long as the model likes; the first seed's do not
    ends = [answer for answer in judge if answer.case.family != "recursion" or answer.seed == 0]
    assert not {answer.name: answer.reason for answer in ends if answer.reason != "stop"}
    decode = plain.tokenizer.decode
    texts = {answer.name: (decode(answer.tokens[:-1]), answer) for answer in judge if answer.reason == "stop"}
    wrong = {name: complaint(text, answer.case.schema) for name, (text, answer) in texts.items()}
    assert not {name: why for name, why in wrong.items() if why is not None}
    pairs = zip(judge, drafted, strict=True)
    assert not [ours.name for ours, theirs in pairs if (ours.tokens, ours.reason) != (theirs.tokens, theirs.reason)]
    steps = [sum(answer.steps for answer in each) for each in (judge, drafted)]
    assert steps[1] < steps[0] / 2, "forced tokens are not drafted"
