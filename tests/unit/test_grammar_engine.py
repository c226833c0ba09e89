"""The engine under grammars: a text is what its grammar says, and what plain decoding would write, whatever drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from decoding.acceptance import Acceptance
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.engine import Engine
from decoding.errors import RequestError
from decoding.grammar.compiler import LIMITS, BackgroundCompiler, GrammarCompiler
from decoding.grammar.queue import GrammarQueue
from decoding.request import GenerateRequest, Grammar, SamplingParams, SpeculationParams
from models.decoder import Decoder
from tests.doubles import AlternatingDrafter, GarbageDrafter, OracleDrafter
from tests.engines import EOS, ROOT, Outcome, make_engine, run, tiny_decoder, whole
from tests.grammars import CHOICES, GRAMMARS, choice, fulfils, regex, spelled

PROMPT = (30, 31, 40, 9, 44)
OFF = SpeculationParams(enabled=False)
WORDS = choice("ABBACABBAGE!", "ABBACHEDDAR?", "DEADBEEFCAFE")


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


def ask(grammar: Grammar | None, request_id: str = "r", **params: object) -> GenerateRequest:
    given = SamplingParams(**{"max_tokens": 40, "temperature": 0.9, "seed": 5, **params})  # type: ignore[arg-type]
    return GenerateRequest(request_id, PROMPT, given, grammar=grammar)


def plain(request: GenerateRequest) -> Outcome:
    alone = replace(request, speculation=OFF)
    return run(make_engine(target(), prefix_caching=False), [alone])[request.request_id, 0]


# what comes out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.source[:12])
def test_every_text_is_what_its_grammar_says(grammar: Grammar, temperature: float) -> None:
    bias = dict.fromkeys((16, 8, EOS), 8.0)  # what completes these texts: ) ! and the end
    request = ask(grammar, temperature=temperature, max_tokens=120, logit_bias=bias, n=2)
    outcomes = run(make_engine(target()), [request])
    for outcome in outcomes.values():
        assert outcome.last.finish_reason == "stop"
        assert outcome.tokens[-1] == EOS
        assert fulfils(spelled(outcome.tokens), grammar), spelled(outcome.tokens)


def test_json_from_the_demo_model() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "sizes": {"type": "array", "maxItems": 3}},
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
    schema["properties"]["sizes"]["items"] = {"type": "integer", "maximum": 99, "minimum": 0}  # type: ignore[index]
    engine = Engine.load(str(ROOT / "demo/target"), num_pages=80, plan="fixed", dtype="float32")
    grammar = Grammar("json_schema", json.dumps(schema))
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=80, temperature=temperature, seed=3)
        drafted = engine.generate("the_box = ", params, grammar=grammar)[0]
        value = json.loads(drafted.text)
        assert list(value) == ["name", "sizes"]
        assert len(value["name"]) <= 12
        assert all(0 <= size <= 99 for size in value["sizes"])
        assert drafted.speculation.by_drafter["forced"].accepted > 0
        undrafted = engine.generate("the_box = ", params, grammar=grammar, speculation=OFF)[0]
        assert undrafted.token_ids == drafted.token_ids
        assert undrafted.speculation.drafted == 0
        assert drafted.speculation.steps < undrafted.speculation.steps


def test_logprobs_are_the_models_own() -> None:
    free, bound = (plain(ask(grammar, logprobs=3)).logprobs[0] for grammar in (None, WORDS))
    assert free.top == bound.top
    assert bound.logprob < 0.0, "the grammar leaves few tokens, and raises none of them"


def test_min_tokens_and_ignore_eos_give_way_to_a_complete_text() -> None:
    for wish in ({"ignore_eos": True}, {"min_tokens": 30}):
        outcome = plain(ask(regex("[A-C]{4}"), **wish))
        assert (len(outcome.tokens), outcome.last.finish_reason) == (5, "stop")
    longest = plain(ask(regex("[A-C]{1,9}"), ignore_eos=True))
    assert len(longest.tokens) == 10, "as long as anything else can follow, it does"


def test_a_grammar_wins_where_other_bans_leave_nothing() -> None:
    """Where it leaves a choice they hold."""
    for bans in ({"allowed_token_ids": (41, 43)}, {"bad_words": ((40,), (42,))}):
        outcome = plain(ask(regex("[AB][AC][CD]A"), **bans))
        assert spelled(outcome.tokens) in ("BADA", "BCDA")
        drafted = run(make_engine(target()), [ask(regex("[AB][AC][CD]A"), **bans)])["r", 0]
        assert drafted.tokens == outcome.tokens


def test_max_tokens_ends_a_text_that_is_not_complete() -> None:
    outcome = plain(ask(regex("[A-C]{30}"), max_tokens=7))
    assert (len(outcome.tokens), outcome.last.finish_reason) == (7, "length")


# drafts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_forced_is_drafted_without_being_asked_for(temperature: float) -> None:
    request = ask(WORDS, temperature=temperature)
    alone = plain(request)
    assert [len(event.token_ids) for event in alone.events] == [1] * len(alone.events)
    engine = make_engine(target())
    outcome = run(engine, [request])["r", 0]
    assert outcome.tokens == alone.tokens
    stats = outcome.last.speculation
    assert stats is not None
    forced = stats.by_drafter["forced"]
    assert forced.accepted == forced.drafted > 6
    assert len(outcome.events) < len(alone.events) / 2
    assert engine.info.drafters == ()
    assert "forced" not in (run(engine, [ask(None)])["r", 0].last.speculation or stats).by_drafter


def test_limits_of_the_client_hold_for_what_is_forced() -> None:
    request = replace(ask(WORDS), speculation=SpeculationParams(max_depth=2, drafters=()))
    sizes = [len(event.token_ids) for event in run(make_engine(target()), [request])["r", 0].events]
    assert max(sizes) == 3
    none = replace(ask(WORDS), speculation=SpeculationParams(max_nodes=0))
    assert {len(event.token_ids) for event in run(make_engine(target()), [none])["r", 0].events} == {1}


@pytest.mark.parametrize("plan", ["fixed", "auto"])
def test_it_is_drafted_beside_every_other_drafter(plan: str) -> None:
    drafters = {
        "garbage": GarbageDrafter,
        "ngram": lambda context: NgramDrafter(NgramOptions(), context),
    }
    engine = make_engine(target(), drafters, plan=plan)  # type: ignore[arg-type]
    for number in range(12):  # an auto plan tries all of its gears
        request = ask(WORDS, seed=number)
        outcome = run(engine, [request])["r", 0]
        assert outcome.tokens == plain(request).tokens
        stats = outcome.last.speculation
        assert stats is not None
        assert stats.by_drafter["forced"].accepted > 6


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_an_oracle_yields_depth_plus_one_tokens_every_step(temperature: float, depth: int) -> None:
    request = ask(regex("[A-H]{60}"), temperature=temperature, max_tokens=48)
    texts = {("r", 0): [*PROMPT, *plain(request).tokens]}
    engine = make_engine(target(), {"oracle": lambda c: OracleDrafter(c, texts)}, max_nodes=2 * depth, max_depth=depth)
    outcome = run(engine, [request])["r", 0]
    assert outcome.tokens == texts["r", 0][len(PROMPT) :]
    assert [len(event.token_ids) for event in outcome.events[:-1]] == [depth + 1] * (len(outcome.events) - 1)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_drafter_that_is_all_right_and_all_wrong_in_turns(temperature: float) -> None:
    request = ask(regex("([A-H]{2}[0-9])+"), temperature=temperature, max_tokens=47, ignore_eos=True)
    texts = {("r", 0): [*PROMPT, *plain(request).tokens]}
    drafters = {"oracle": partial(AlternatingDrafter, texts=texts)}
    engine = make_engine(target(), drafters, max_nodes=8, max_depth=4)
    outcome = run(engine, [request])["r", 0]
    assert outcome.tokens == texts["r", 0][len(PROMPT) :]
    sizes = [len(event.token_ids) for event in outcome.events]
    assert 5 in sizes
    assert 1 in sizes[1:-1]


def test_refused_drafts_are_not_bought() -> None:
    request = ask(regex("[A-H]{30}"), max_tokens=31)
    engine = make_engine(target(), {"garbage": GarbageDrafter}, plan="fixed:min_probability=0")
    stats = run(engine, [request])["r", 0].last.speculation
    free = run(engine, [ask(None, max_tokens=31, ignore_eos=True)])["r", 0].last.speculation
    assert stats is not None
    assert free is not None
    per_step = stats.by_drafter["garbage"].drafted / stats.steps, free.by_drafter["garbage"].drafted / free.steps
    assert 0 < per_step[0] < per_step[1] / 2, "8 of 48 tokens are allowed"


def test_typical_acceptance_keeps_to_the_grammar() -> None:
    rule = SpeculationParams(acceptance=Acceptance("typical", epsilon=0.01))
    for number in range(6):
        request = replace(ask(choice(*CHOICES), temperature=1.3, seed=number), speculation=rule)
        engine = make_engine(target(), {"garbage": lambda c, n=number: GarbageDrafter(c, n)})
        outcome = run(engine, [request])["r", 0]
        assert outcome.last.speculation is not None
        assert outcome.last.speculation.acceptance == "typical"
        assert fulfils(spelled(outcome.tokens), choice(*CHOICES))


# beside others -------------------------------------------------------------------------------------------------------


def test_batch_mates_with_and_without_grammars_keep_their_texts() -> None:
    requests = [ask(grammar, f"r{number}", seed=number) for number, grammar in enumerate([None, *GRAMMARS, None])]
    together = run(make_engine(target(), {"garbage": GarbageDrafter}), requests)
    for request in requests:
        assert together[request.request_id, 0].tokens == plain(request).tokens


def test_preemption_keeps_the_place_in_the_grammar() -> None:
    grammar = regex("([A-F]+=[0-9]{1,3},)+!")
    requests = [ask(grammar, f"r{number}", seed=number, max_tokens=90, ignore_eos=True) for number in range(4)]
    engine = make_engine(target(), num_pages=12, prefix_caching=False)
    together = run(engine, requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        assert together[request.request_id, 0].tokens == plain(request).tokens


def test_choices_are_different_and_each_what_the_grammar_says() -> None:
    grammar = regex("[A-H]{12}")
    outcomes = run(make_engine(target()), [ask(grammar, n=3)])
    texts = {spelled(outcome.tokens) for outcome in outcomes.values()}
    assert len(texts) == 3
    assert all(fulfils(text, grammar) for text in texts)
    assert outcomes["r", 0].tokens == plain(ask(grammar)).tokens


# what cannot be compiled ---------------------------------------------------------------------------------------------


def test_a_grammar_that_cannot_be_compiled_ends_its_own_request() -> None:
    engine = make_engine(target())
    outcomes = run(engine, [ask(regex("(A"), "bad", n=2), ask(WORDS, "good")])
    for number in range(2):
        end = outcomes["bad", number].last
        assert (end.finish_reason, end.error_code) == ("error", "invalid_grammar")
        assert end.error is not None
        assert end.error.startswith("The grammar cannot be compiled")
    assert outcomes["good", 0].tokens == plain(ask(WORDS)).tokens
    assert whole(engine)


def test_generate_raises_for_it() -> None:
    engine = make_engine(target())
    with pytest.raises(RequestError) as caught:
        engine.generate(PROMPT, grammar=regex("(A"))
    assert caught.value.code == "invalid_grammar"
    assert not engine.has_work


def test_a_request_is_cancelled_while_its_grammar_is_compiled() -> None:
    engine = make_engine(target())
    engine.submit(ask(WORDS))
    [end] = engine.cancel("r")
    assert end.finish_reason == "cancelled"
    assert not engine.has_work
    assert run(engine, [ask(WORDS, "again")])["again", 0].last.finish_reason == "stop"


def test_a_grammar_that_outgrows_its_limits_ends_its_own_request() -> None:
    """Hundreds of readings of one text: the library's limits are for the whole engine, and this text reaches them."""
    ambiguous = Grammar("grammar", 'start: s\ns: s s | s s s | "A" | "A" s | s "A" s | "A" s "A" s')
    request = ask(ambiguous, "large", max_tokens=400, ignore_eos=True)
    engine = make_engine(target())
    outcomes = run(engine, [request, ask(WORDS, "small")])
    end = outcomes["large", 0].last
    assert (end.finish_reason, end.error_code) == ("error", "grammar_too_complex")
    assert set(outcomes["large", 0].tokens) == {40}
    alone = plain(request)
    assert alone.tokens == outcomes["large", 0].tokens
    assert outcomes["small", 0].tokens == plain(ask(WORDS)).tokens
    assert whole(engine)


# limits that texts share ---------------------------------------------------------------------------------------------

HISTORIES = regex(
    "[A-H]*A[A-H]{8}"
)  # which of the last 9 characters were an A: hundreds of states, others for each text


def limited_engine(states: int) -> Engine:
    engine = make_engine(target(), {"garbage": GarbageDrafter})
    compiler = GrammarCompiler(engine.tokenizer, engine.info.vocab_size, (EOS,), {**LIMITS, "max_lexer_states": states})
    engine._grammars = GrammarQueue(BackgroundCompiler(compiler), (EOS,))
    return engine


def test_what_other_texts_used_up_ends_nobody() -> None:
    """The library's memory of a grammar is full, of all its texts together: they go on with a new one."""
    requests = [ask(HISTORIES, f"r{number}", seed=number, max_tokens=40, temperature=1.5) for number in range(8)]
    engine = limited_engine(80)
    for together in ([requests[0]], requests[1:4], requests[4:]):
        for key, outcome in run(engine, together).items():
            request = next(each for each in together if each.request_id == key[0])
            assert outcome.last.finish_reason in ("stop", "length")
            assert outcome.tokens == plain(request).tokens
            assert all(event.token_ids for event in outcome.events)
    assert any(sequence_was_set_back(engine, request) for request in requests)


def sequence_was_set_back(engine: Engine, request: GenerateRequest) -> bool:
    """Whether so few states are too few for this text after the others."""
    engine.submit(replace(request, request_id="again"))
    [sequence] = engine._sequences.values()
    while engine.has_work:
        engine.step()
    return sequence.set_back_at >= 0


def test_a_text_that_is_too_much_by_itself_ends() -> None:
    engine = limited_engine(30)
    outcome = run(engine, [ask(HISTORIES, max_tokens=60, temperature=1.5)])["r", 0]
    assert (outcome.last.finish_reason, outcome.last.error_code) == ("error", "grammar_too_complex")
    assert whole(engine)
    assert run(engine, [ask(WORDS, "next")])["next", 0].last.finish_reason == "stop"
