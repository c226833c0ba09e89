"""Drafters that continue from the target's features: what belongs together, gaps, a vocabulary of their own."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from decoding.drafters.base import Drafter, DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import PENDING, FeatureDrafter
from decoding.drafters.features import LOOSE_PIECES
from decoding.engine import Engine
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sampling import Sampling
from decoding.sequence import SequenceId
from models.batch import PAGE_SIZE
from models.decoder import Decoder
from models.tree import Trees
from tests.doubles import AlternatingDrafter
from tests.engines import ALL_NODES, VOCAB, BuildDrafter, Outcome, make_engine, run, tiny_decoder
from tests.feature_doubles import OracleFeatureModel, OracleTarget, OracleWeights, ToyFeatureModel

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 1.5}),
]


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def plain_engine() -> Engine:
    return make_engine(target(), prefix_caching=False)


# a model that is right if it is fed right ----------------------------------------------------------------------------


def oracle(depth: int, weights: OracleWeights, continues: bool, **options: object) -> BuildDrafter:
    """A chain of ``depth``, unless the options say more."""
    chosen: dict[str, object] = {"top_k": 1, "beam": 1, "min_confidence": 0.0, **options}
    built = TreeOptions("", depth=depth, **chosen)  # type: ignore[arg-type]
    return lambda context: FeatureDrafter(built, context, OracleFeatureModel(weights, continues))


def engine_with(
    depth: int,
    drafters: dict[str, BuildDrafter] | None = None,
    *,
    remembers: bool = True,
    continues: bool = True,
    **settings: object,
) -> Engine:
    weights = OracleWeights(remembers, continues)
    settings = {"max_nodes": depth, "max_depth": depth, "plan": ALL_NODES, **settings}
    drafters = {"feature": oracle(depth, weights, continues)} if drafters is None else drafters
    return make_engine(OracleTarget(weights), drafters, **settings)  # type: ignore[arg-type]


def request(number: int, prompt_len: int, max_tokens: int = 41, n: int = 1) -> GenerateRequest:
    params = PARAMS[number % len(PARAMS)]
    changed = SamplingParams(**{**vars(params), "max_tokens": max_tokens, "ignore_eos": True, "n": n})
    prompt = tuple((5 * i * i + number + 7 * prompt_len) % VOCAB for i in range(prompt_len))
    return GenerateRequest(f"r{number}", prompt, changed)


def sizes(outcome: Outcome) -> list[int]:
    return [len(event.token_ids) for event in outcome.events]


def assert_all_accepted(outcome: Outcome) -> None:
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.drafted == stats.accepted > 0


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("number", range(len(PARAMS)))
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_every_step_yields_depth_plus_one_tokens(number: int, depth: int, continues: bool) -> None:
    engine = engine_with(depth, continues=continues)
    for prompt_len in (1, 2, 16, 17, 33, 37):
        for found in (0, (prompt_len - 1) // PAGE_SIZE * PAGE_SIZE):  # the second time the prompt's pages are there
            outcome = run(engine, [request(number, prompt_len)])[f"r{number}", 0]
            assert outcome.events[0].cached_tokens == found
            # the token before the root must be known: found, if the root is all that is left of the prompt
            first = [] if found and prompt_len - found == 1 else [1]
            left = 41 - len(first)
            assert sizes(outcome)[: len(first)] == first
            assert set(sizes(outcome)[len(first) : -1]) == {depth + 1}
            assert len(outcome.events) == len(first) + -(-left // (depth + 1))
            assert_all_accepted(outcome)


def test_a_beam_holds_the_right_path() -> None:
    """Carries are those of the nodes' own parents, wherever these stand in the beam."""
    weights = OracleWeights(remembers=True, fades=True)
    engine = engine_with(4, {"feature": oracle(4, weights, True, top_k=3, beam=3)}, max_nodes=63)
    for number in range(len(PARAMS)):
        outcome = run(engine, [request(number, 21)])[f"r{number}", 0]
        assert outcome.last.speculation is not None
        assert len(outcome.tokens) / outcome.last.speculation.steps > 0.8 * 4


def test_in_a_batch_with_chunked_prompts() -> None:
    for budget, rows in ((5, 3), (23, 7)):
        engine = engine_with(3, max_num_batched_tokens=budget, max_num_seqs=rows)
        outcomes = run(engine, [request(number, 9 * number + 2, n=1 + number % 2) for number in range(7)])
        for outcome in outcomes.values():
            stats = outcome.last.speculation
            assert stats is not None
            assert stats.drafted == stats.accepted
        assert engine.stats().accepted > 20, "chunks leave little of the budget to drafts, but some"


def test_choices_find_the_prompt_of_the_first() -> None:
    """Pages of a prompt can be found by siblings in the very next step, the drafter's K/V in them."""
    engine = engine_with(3)
    outcomes = run(engine, [request(1, 49, n=4)])
    for choice in range(4):
        assert_all_accepted(outcomes["r1", choice])


def test_after_preemption() -> None:
    engine = engine_with(3, num_pages=8)
    outcomes = run(engine, [request(number, 20 + number, max_tokens=50) for number in range(4)])
    assert engine.stats().preemptions > 0
    for outcome in outcomes.values():
        assert_all_accepted(outcome)


def test_prompt_logprobs_find_no_pages() -> None:
    engine = engine_with(3)
    asked = request(1, 40)
    run(engine, [asked])
    scored = GenerateRequest("scored", asked.prompt_ids, SamplingParams(30, 0.0, ignore_eos=True, prompt_logprobs=0))
    outcome = run(engine, [scored])["scored", 0]
    assert outcome.events[0].cached_tokens == 0
    assert_all_accepted(outcome)


@pytest.mark.parametrize("number", range(len(PARAMS)))
def test_beside_a_drafter_that_is_right_and_wrong_by_turns(number: int) -> None:
    """Accepted nodes of another drafter are caught up with, in whatever columns of the merged tree they stood."""
    asked = request(number, 19)
    truth = run(engine_with(0, {}), [asked])[asked.request_id, 0].tokens
    texts: dict[SequenceId, list[int]] = {(asked.request_id, 0): [*asked.prompt_ids, *truth]}
    weights = OracleWeights(remembers=True, fades=True)
    drafters: dict[str, BuildDrafter] = {
        "alternating": lambda context: AlternatingDrafter(context, texts),
        "feature": oracle(2, weights, True),
    }
    outcome = run(engine_with(5, drafters, max_nodes=63), [asked])[asked.request_id, 0]
    assert outcome.tokens == truth
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.by_drafter["feature"].accepted == stats.by_drafter["feature"].drafted > 0
    assert 0 < stats.by_drafter["alternating"].accepted < stats.by_drafter["alternating"].drafted
    assert sizes(outcome)[:-1] == [6 if turn % 2 == 0 else 3 for turn in range(len(outcome.events) - 1)]


# gaps ----------------------------------------------------------------------------------------------------------------


def drafts_again(outcome: Outcome, depth: int, silent: int) -> None:
    """At most ``silent`` tokens come without a draft; then all is right."""
    tokens = 0
    steps = sizes(outcome)[:-1]
    while steps and steps[0] == 1:
        tokens += steps.pop(0)
    assert tokens <= silent
    assert set(steps) == {depth + 1}
    assert_all_accepted(outcome)


def test_pages_found_without_its_k_v() -> None:
    """The model goes on behind them."""
    engine = engine_with(3, remembers=False, continues=False)
    prompt = request(0, 43).prompt_ids
    params = SamplingParams(40, 0.0, ignore_eos=True)
    without = GenerateRequest("without", prompt, params, SpeculationParams(enabled=False))
    text = run(engine, [without])["without", 0].tokens
    wanted = GenerateRequest("wanted", (*prompt, *text[:20]), params)
    outcome = run(engine, [wanted])["wanted", 0]
    assert outcome.events[0].cached_tokens == 48
    drafts_again(outcome, 3, 1)


class Lazy(FeatureDrafter):
    """Drafts nothing between two lengths of a text."""

    pause: range

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        if any(row.sequence.length in self.pause for row in plan.deciding):
            return None
        return super().propose(plan, quota, sampling)


def paused_drafter(paused: int, weights: OracleWeights, made: list[Lazy]) -> BuildDrafter:
    def build(context: DrafterContext) -> Drafter:
        options = TreeOptions("", depth=3, top_k=1, beam=1, min_confidence=0.0)
        made.append(Lazy(options, context, OracleFeatureModel(weights, continues=paused <= PENDING)))
        made[0].pause = range(40, 40 + paused)
        return made[0]

    return build


@pytest.mark.parametrize("paused", [20, PENDING - 2, PENDING + 30])
def test_after_a_pause(paused: int) -> None:
    """What waits is caught up with; what waits for too long is lost, and the drafter goes on behind it."""
    waits = paused <= PENDING
    weights = OracleWeights(remembers=waits, fades=waits)
    made: list[Lazy] = []
    drafters = {"feature": paused_drafter(paused, weights, made)}
    engine = engine_with(3, drafters, remembers=waits, continues=waits)
    asked = request(1, 20, max_tokens=paused + 80)
    engine.submit(asked)
    sequence, steps, valid = engine._sequences["r1", 0], [], [0]
    while engine.has_work:
        steps += [len(event.token_ids) for event in engine.step()]
        if engine.has_work:
            valid.append(made[0].valid_length(sequence))
            pieces = made[0]._features._pieces[sequence.id]
            assert len(pieces) <= LOOSE_PIECES + 2
            assert sum(len(piece.features) for piece in pieces) <= PENDING + 4, "what waits is bounded"
    assert valid == sorted(valid)
    assert set(steps[1:-1]) == {1, 4}
    silent = steps[1:-1].count(1)
    if waits:
        assert silent <= paused
        assert valid[-1] >= sequence.length - 8, "two steps"
        return
    assert paused - 4 <= silent <= paused + PAGE_SIZE
    assert valid[-1] < 44, "pages behind a gap are not offered"
    again = GenerateRequest("again", (*sequence.tokens.tolist(), 1), SamplingParams(30, 0.0, ignore_eos=True))
    found = engine._stepper.cache.prefixes.match(np.array(again.prompt_ids), "")
    engine._stepper.cache.prefixes.release(found.pages)
    assert len(found.pages) == (sequence.length - 1) // PAGE_SIZE
    assert [bool(flags) for flags in found.valid] == [n < valid[-1] // PAGE_SIZE for n in range(len(found.pages))]
    outcome = run(engine, [again])["again", 0]
    drafts_again(outcome, 3, PAGE_SIZE)


def test_rows_that_pass_its_last_position_among_others() -> None:
    """A row that is caught up with and cannot reach its root stands beside those that can."""
    weights = OracleWeights(remembers=True, fades=True)

    def build(context: DrafterContext) -> Drafter:
        model = OracleFeatureModel(weights, continues=True)
        model.max_positions = 50
        return FeatureDrafter(TreeOptions("", depth=3, top_k=1, beam=1, min_confidence=0.0), context, model)

    engine = engine_with(3, {"feature": build})
    outcomes = run(engine, [request(number, 40 - 5 * number, max_tokens=20) for number in range(5)])
    stats = [outcome.last.speculation for outcome in outcomes.values()]
    assert all(each and each.drafted == each.accepted > 0 for each in stats)
    assert len({each.steps for each in stats if each}) > 2, "the longer ones go on without drafts"


def test_contexts_beyond_its_positions_are_not_drafted() -> None:
    short = ToyFeatureModel(target())
    short.max_positions = 24
    options = TreeOptions("", depth=5, beam=3, min_confidence=0.0)
    engine = make_engine(target(), {"toy": lambda context: FeatureDrafter(options, context, short)}, max_nodes=30)
    requests = [
        GenerateRequest(f"r{n}", tuple(range(n, n + length)), SamplingParams(max_tokens=40, seed=n, ignore_eos=True))
        for n, length in enumerate((1, 8, 20, 22, 24, 25, 40))
    ]
    outcomes = run(engine, requests)
    for asked in requests:
        assert outcomes[asked.request_id, 0].tokens == run(plain_engine(), [asked])[asked.request_id, 0].tokens
    drafted = [outcomes[asked.request_id, 0].last.speculation.drafted for asked in requests]  # type: ignore[union-attr]
    assert all(drafted[:5])
    assert drafted[5:] == [0, 0]


# a draft vocabulary --------------------------------------------------------------------------------------------------


class Watching(FeatureDrafter):
    """Keeps which tokens it proposed as possible."""

    proposed: set[int]

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = super().propose(plan, quota, sampling)
        if trees is not None:
            self.proposed.update(trees.tokens[:, 1:][trees.confidence[:, 1:] > 0].tolist())
        return trees


@pytest.mark.parametrize("taps", [(), (1,), (2, 0, 1)])
@pytest.mark.parametrize("continues", [False, True])
def test_a_draft_vocabulary_and_any_taps(taps: tuple[int, ...], continues: bool) -> None:
    vocabulary = (*range(0, VOCAB, 3), VOCAB + 1)  # the last is padding, which a broken head may well like
    proposed: set[int] = set()

    def build(context: DrafterContext) -> Drafter:
        model = ToyFeatureModel(target(), taps, continues, vocabulary)
        drafter = Watching(TreeOptions("", top_k=3, beam=3, min_confidence=0.0), context, model)
        drafter.proposed = proposed
        return drafter

    engine = make_engine(target(), {"toy": build}, max_nodes=30)
    for number in range(len(PARAMS)):
        asked = request(number, 30, n=2)
        ours, plain = run(engine, [asked]), run(plain_engine(), [asked])
        for choice in range(2):
            assert ours[asked.request_id, choice].tokens == plain[asked.request_id, choice].tokens
    assert len(proposed) > 8
    assert proposed <= set(vocabulary[:-1])
    assert engine.stats().accepted > 0
