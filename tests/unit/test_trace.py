"""The trace of a choice: it tells the steps as they were, and costs nothing where nobody asked."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.drafters.recycling import RecyclingDrafter, RecyclingOptions
from decoding.drafters.suffix import SuffixDrafter, SuffixOptions
from decoding.engine import Engine
from decoding.messages import StepTrace
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.trace import MAX_NODES, MAX_STEPS
from models.decoder import Decoder
from tests.doubles import GarbageDrafter, OracleDrafter
from tests.engines import ALL_NODES, BuildDrafter, Outcome, device_ops, make_engine, run, tiny_decoder

PROMPT = (3, 1, 4, 1, 5)
TRACED = SpeculationParams(trace=True)


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


def ask(name: str = "r", *, traced: bool = True, **params: object) -> GenerateRequest:
    given = {"max_tokens": 40, "temperature": 0.9, "seed": 11, "ignore_eos": True, **params}
    return GenerateRequest(name, PROMPT, SamplingParams(**given), TRACED if traced else SpeculationParams())  # type: ignore[arg-type]


def truth(request: GenerateRequest) -> list[int]:
    return run(make_engine(target()), [replace(request, speculation=SpeculationParams())])["r", 0].tokens


def oracle_engine(text: list[int], *, noise: bool = True, **settings: object) -> Engine:
    """A drafter that knows the text, and one that knows nothing."""
    texts = {("r", 0): [*PROMPT, *text]}
    drafters: dict[str, BuildDrafter] = {"oracle": lambda c: OracleDrafter(c, texts)}
    drafters |= {"garbage": GarbageDrafter} if noise else {}
    return make_engine(target(), drafters, **{"plan": ALL_NODES, "max_nodes": 12, "max_depth": 4, **settings})


def steps_of(outcome: Outcome) -> list[StepTrace]:
    return [step for event in outcome.events for step in event.trace]


def check(outcome: Outcome) -> None:
    """The trace and the events tell the same."""
    text = [*PROMPT, *outcome.tokens]
    place = len(PROMPT)
    for event in outcome.events:
        [step] = event.trace
        assert step.position == place - 1
        assert step.tokens[0] == text[step.position]
        assert (step.parents[0], step.drafters[0]) == (-1, ())
        assert all(0 <= parent < column for column, parent in enumerate(step.parents) if column)
        assert len(step.tokens) == len(step.parents) == len(step.confidence) == len(step.drafters)
        assert all(step.drafters[1:])
        assert all(0 <= each <= 1 for each in step.confidence)
        above = 0
        for column in step.accepted:
            assert step.parents[column] == above
            above = column
        made = [step.tokens[column] for column in step.accepted]
        made += [] if step.bonus is None else [step.bonus]
        assert tuple(made) == event.token_ids
        place += len(made)


@pytest.mark.parametrize("ops", ["host", "device"])
def test_it_tells_every_step_as_it_was(ops: str) -> None:
    request = ask()
    text = truth(request)
    engine = oracle_engine(text, ops=device_ops() if ops == "device" else None)
    outcome = run(engine, [request])["r", 0]
    assert outcome.tokens == text
    check(outcome)
    steps, stats = steps_of(outcome), outcome.last.speculation
    assert stats is not None
    assert len(steps) == stats.steps
    assert sum(len(step.tokens) - 1 for step in steps) == stats.drafted
    assert sum(len(step.accepted) for step in steps) == stats.accepted
    for name, own in stats.by_drafter.items():
        assert sum(name in names for step in steps for names in step.drafters) == own.drafted


def test_a_node_of_two_drafters_has_both_names() -> None:
    request = ask(temperature=0.0)
    texts = {("r", 0): [*PROMPT, *truth(request)]}
    drafters = {"one": lambda c: OracleDrafter(c, texts), "two": lambda c: OracleDrafter(c, texts)}
    engine = make_engine(target(), drafters, plan=ALL_NODES, max_nodes=4, max_depth=4)
    first = steps_of(run(engine, [request])["r", 0])[0]
    assert first.drafters[1:] == (("one", "two"),) * 4


def test_plain_steps_have_their_root_alone() -> None:
    outcome = run(make_engine(target()), [ask(max_tokens=5)])["r", 0]
    check(outcome)
    assert all(step.tokens[1:] == step.accepted == () and step.bonus is not None for step in steps_of(outcome))


def test_a_text_that_ends_on_the_accepted_path_has_no_bonus() -> None:
    request = ask()
    text = truth(request)
    place = next(i for i in range(6, 9) if text[i] not in text[:i])
    request = replace(request, params=replace(request.params, stop_token_ids=(text[place],)))
    outcome = run(oracle_engine(text, noise=False), [request])["r", 0]
    check(outcome)
    assert outcome.last.finish_reason == "stop"
    assert (steps_of(outcome)[-1].bonus is None) == ((place + 1) % 5 != 0)


def test_drafters_that_remember_other_texts_are_known() -> None:
    drafters: dict[str, BuildDrafter] = {
        "ngram": lambda c: NgramDrafter(NgramOptions(), c),
        "suffix": lambda c: SuffixDrafter(SuffixOptions(), c),
        "recycling": lambda c: RecyclingDrafter(RecyclingOptions(), c),
    }
    assert make_engine(target(), drafters).info.recalling == ("suffix", "recycling")


def test_nobody_asked() -> None:
    request = ask(traced=False)
    text = truth(request)
    both = oracle_engine(text)
    alone = run(oracle_engine(text), [request])["r", 0]
    assert not steps_of(alone)
    other = replace(ask("other", seed=4), speculation=SpeculationParams(trace=True, drafters=("garbage",)))
    mates = run(both, [request, other])
    assert mates["r", 0].tokens == alone.tokens
    assert not steps_of(mates["r", 0])
    check(mates["other", 0])


def test_large_trees_fill_a_trace_sooner() -> None:
    engine = oracle_engine([0] * 600, max_nodes=60)
    outcome = run(engine, [ask(max_tokens=450)])["r", 0]
    nodes = sum(len(step.tokens) for step in steps_of(outcome))
    assert MAX_NODES <= nodes < MAX_NODES + 64


def test_long_texts_tell_their_first_steps() -> None:
    request = ask(max_tokens=MAX_STEPS + 20)
    outcome = run(make_engine(target()), [request])["r", 0]
    assert [len(event.trace) for event in outcome.events] == [1] * MAX_STEPS + [0] * 20


def test_a_script_gets_it_with_its_generation() -> None:
    engine = make_engine(target(), {"ngram": lambda c: NgramDrafter(NgramOptions(), c)})
    [made] = engine.generate(PROMPT, ask().params, speculation=TRACED)
    assert len(made.trace) == made.speculation.steps
    [silent] = engine.generate(PROMPT, ask().params)
    assert silent.trace == ()
    assert silent.token_ids == made.token_ids
