"""A grammar that begins behind the model's reasoning: masks, drafts, ends; and that drafts change nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from decoding.engine import Engine
from decoding.errors import RequestError
from decoding.grammar.late import LateMatcher
from decoding.grammar.matcher import Matcher
from decoding.request import GenerateRequest, Reasoning, SamplingParams, SpeculationParams
from models.decoder import Decoder
from tests.doubles import AlternatingDrafter, GarbageDrafter, OracleDrafter
from tests.engines import EOS, VOCAB, Outcome, make_engine, run, tiny_decoder
from tests.grammars import choice, compiled, fulfils, regex, said, spelled

OPEN, CLOSE, A, B, C = 2, 3, 40, 41, 42  # the letters are tokens of one character
EVERYTHING = set(range(VOCAB))
BEFORE, INSIDE = Reasoning(CLOSE, OPEN), Reasoning(CLOSE)
WORDS = choice("ABBACABBAGE!", "ABBADEAD?", "DEADBEEFCAFE")


def late(pattern: str, reasoning: Reasoning, ends: tuple[int, ...] = (EOS,), **limits: int) -> LateMatcher:
    return LateMatcher(compiled(regex(pattern)), ends, reasoning, **limits)  # type: ignore[arg-type]


def allowed(state: Matcher, *path: int) -> set[int]:
    [words] = state.masks([path])
    assert words is not None
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()) & EVERYTHING


# masks ---------------------------------------------------------------------------------------------------------------


def test_what_is_thought_is_free_and_what_is_said_is_not() -> None:
    state = late("AB", INSIDE)
    assert allowed(state) == EVERYTHING - {EOS}, "nothing is said yet, so it may not end"
    assert allowed(state, A, C, OPEN) == EVERYTHING - {EOS}
    assert allowed(state, C, CLOSE) == {A}
    assert allowed(state, C, CLOSE, A) == {B}
    assert allowed(state, CLOSE, A, B) == {EOS}
    assert state.commit([C, CLOSE, A]) == (3, None)
    assert allowed(state) == {B}
    assert state.commit([B, EOS, 7]) == (2, "stop")


def test_the_first_token_decides_whether_it_thinks() -> None:
    state = late("AB", BEFORE)
    assert allowed(state) == {A, OPEN}
    assert allowed(state, A) == {B}, "it said something at once"
    assert allowed(state, OPEN) == EVERYTHING - {EOS}
    assert allowed(state, OPEN, CLOSE) == {A}
    assert state.commit([A]) == (1, None)
    assert allowed(state) == {B}
    thinking = late("AB", BEFORE)
    assert thinking.commit([OPEN, C]) == (2, None)
    assert allowed(thinking, CLOSE) == {A}


def test_only_the_first_closing_token_is_one() -> None:
    state = late(".{1,9}", INSIDE)
    assert state.commit([CLOSE]) == (1, None)
    assert OPEN not in allowed(late("[A-C]", INSIDE), CLOSE)
    assert state.commit([A, B, EOS]) == (3, "stop")


def test_drafts_are_judged_on_their_side_of_the_tag() -> None:
    state = late("A(B|C)C", INSIDE)
    assert state.forced() == []
    assert state.allows((B,))
    assert state.allows((B, CLOSE))
    assert state.allows((B, CLOSE, A))
    assert not state.allows((B, CLOSE, B))
    assert not state.allows((EOS,))
    assert state.commit([CLOSE]) == (1, None)
    assert state.forced() == [A], "forced tokens are drafted as soon as it has to say something"


def test_tokens_that_are_thought_do_not_count_for_min_tokens() -> None:
    """Else a mask would depend on how much of the thought is drafted."""
    state = late("AB?", INSIDE, min_tokens=2)
    assert allowed(state, C, C, CLOSE, A) == {B}
    assert state.commit([C, C]) == (2, None)
    assert allowed(state, CLOSE, A) == {B}
    assert allowed(state, CLOSE, A, B) == {EOS}


def test_a_closing_token_that_is_a_stop_token_stops() -> None:
    state = late("AB", INSIDE, ends=(EOS, CLOSE))
    assert CLOSE in allowed(state)
    assert state.commit([C, CLOSE, A]) == (2, "stop")


@pytest.mark.parametrize("text", [[C, C], [C, CLOSE], [C, CLOSE, A], [A]])
def test_another_matcher_goes_on_from_where_one_was(text: list[int]) -> None:
    reasoning = BEFORE if text == [A] else INSIDE
    first, second = late("AB", reasoning), late("AB", reasoning)
    first.commit(text)
    second.resume(text)
    assert allowed(first) == allowed(second)
    assert allowed(first, CLOSE) == allowed(second, CLOSE) if CLOSE not in text and A not in text else True


# in an engine --------------------------------------------------------------------------------------------------------


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


def ask(reasoning: Reasoning | None, **params: object) -> GenerateRequest:
    given = SamplingParams(  # (the model would not close a tag by itself)
        **{"max_tokens": 120, "temperature": 1.0, "seed": 5, "logit_bias": {CLOSE: 3.0, OPEN: 6.0}, **params}  # type: ignore[arg-type]
    )
    return GenerateRequest("r", (30, 31, 40, 9, 44), given, grammar=WORDS, reasoning=reasoning)


def alone(engine: Engine, request: GenerateRequest) -> Outcome:
    return run(engine, [request])["r", 0]


@pytest.mark.parametrize("reasoning", [INSIDE, BEFORE], ids=["inside", "before"])
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_what_the_grammar_says_and_drafts_change_nothing(seed: int, reasoning: Reasoning) -> None:
    request = ask(reasoning, seed=seed)
    plain = alone(make_engine(target()), replace(request, speculation=SpeculationParams(enabled=False)))
    assert plain.last.finish_reason == "stop"
    assert fulfils(spelled(said(plain.tokens, reasoning)), WORDS)
    assert len(said(plain.tokens, reasoning)) < len(plain.tokens)
    texts = {("r", 0): [*request.prompt_ids, *plain.tokens]}
    for double in (OracleDrafter, AlternatingDrafter):
        drafters = {"knows": lambda context, double=double: double(context, texts), "garbage": GarbageDrafter}
        drafted = alone(make_engine(target(), drafters, max_nodes=12, max_depth=6), request)
        assert drafted.tokens == plain.tokens
    assert drafted.last.speculation is not None
    assert drafted.last.speculation.accepted > 0


def test_without_reasoning_it_says_it_from_the_first_token_on() -> None:
    assert fulfils(spelled(alone(make_engine(target()), ask(None)).tokens), WORDS)


def test_who_thinks_to_the_limit_says_nothing() -> None:
    outcome = alone(make_engine(target()), ask(INSIDE, logit_bias={CLOSE: -100.0}, max_tokens=20))
    assert len(outcome.tokens) == 20
    assert EOS not in outcome.tokens
    assert outcome.last.finish_reason == "length"


def test_tags_that_are_no_ids_are_refused() -> None:
    with pytest.raises(RequestError, match="reasoning has token id 48"):
        make_engine(target()).submit(ask(Reasoning(VOCAB)))
