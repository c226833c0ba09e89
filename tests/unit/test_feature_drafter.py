"""Drafters that continue from the target's features: pairing, K/V, page features, gaps."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

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
from tests.doubles import AlternatingDrafter, GarbageDrafter
from tests.engines import VOCAB, BuildDrafter, Outcome, make_engine, run, tiny_decoder
from tests.feature_doubles import OracleFeatureModel, OracleTarget, OracleWeights, ToyFeatureModel
from tests.paged import PagedRun

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 1.5}),
]


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
    settings = {"max_nodes": depth, "max_depth": depth, "min_probability": 0.0, **settings}
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


def test_what_it_keeps_with_each_page_is_in_the_price_of_a_page() -> None:
    for continues in (False, True):
        served = Served(ToyFeatureModel(target(), continues=continues), kv_cache_memory=2**22, num_pages=None)
        drafter, pages = served.made[0], served.engine.stats().pages_total
        kept = drafter._features._pages.nbytes + drafter._page_carry.nbytes
        assert kept == pages * drafter.needs.page_bytes
        caches = (served.engine._stepper.cache.kv, drafter._cache)
        spent = kept + sum(kv.keys.nbytes + kv.values.nbytes for kv in caches)
        assert 2**22 - spent // pages < spent <= 2**22


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
    """The model begins anew behind them, at the positions of the text."""
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
    """What waits is caught up with; what waits for too long is lost, and the drafter begins anew."""
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


def test_k_v_behind_a_gap() -> None:
    """It is that of a text which begins at the gap, at the positions where it stands."""
    model = ToyFeatureModel(target(), continues=True)
    served = Served(model)
    params = SamplingParams(30, 0.8, seed=1, ignore_eos=True)
    prompt = request(0, 40).prompt_ids
    run(served.engine, [GenerateRequest("without", prompt, params, SpeculationParams(enabled=False))])
    for name in ("a", "b"):
        served.engine.submit(GenerateRequest(name, prompt, params))
    while served.engine.has_work:
        served.engine.step()
        for sequence in served.engine._sequences.values():
            progress = served.made[0]._progress[sequence.id]
            assert progress.base == 2
            assert served.made[0].valid_length(sequence) == 0
            text = sequence.tokens[: progress.end].tolist()
            _, (keys, values), _ = computed_anew(model, text, gap=32)
            slots = [sequence.pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(33, progress.end)]
            for ours, theirs in zip(
                (served.made[0]._cache.keys, served.made[0]._cache.values), (keys, values), strict=True
            ):
                torch.testing.assert_close(ours[:, slots], theirs[:, 1 : progress.end - 32], rtol=0, atol=1e-9)
    assert served.engine.stats().by_drafter["toy"].accepted > 0


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


# K/V against K/V computed anew ---------------------------------------------------------------------------------------


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def plain_engine() -> Engine:
    return make_engine(target(), prefix_caching=False)


class Served:
    """An engine with a feature drafter among others, whose memory a test can look into."""

    def __init__(self, model: ToyFeatureModel, **settings: object) -> None:
        self.model = model
        self.made: list[FeatureDrafter] = []
        options = TreeOptions("", depth=4, top_k=3, beam=3, min_confidence=0.0)

        def build(context: DrafterContext) -> Drafter:
            self.made.append(FeatureDrafter(options, context, model))
            return self.made[-1]

        drafters: dict[str, BuildDrafter] = {"garbage": GarbageDrafter, "toy": build}
        self.engine = make_engine(target(), drafters, **settings)

    def check_shared_pages(self, text: list[int], salt: str = "") -> tuple[int, int]:
        """Compare what a prompt that begins with ``text`` would find with what is computed anew; pages, and drafted."""
        prefixes, drafter = self.engine._stepper.cache.prefixes, self.made[0]
        hit = prefixes.match(np.array([*text, 0]), salt)
        try:
            if not hit.pages:
                return 0, 0
            drafted = [number for number, valid in enumerate(hit.valid) if valid >> 1 & 1]
            features, fresh, carry = computed_anew(self.model, text[: len(hit.pages) * PAGE_SIZE])
            ends = torch.arange(PAGE_SIZE - 1, len(features), PAGE_SIZE)
            torch.testing.assert_close(drafter._features._pages[hit.pages], features[ends], rtol=0, atol=1e-9)
            for number in drafted:
                page = hit.pages[number]
                # slot 0 of a text has no entry
                at = slice(max(1, number * PAGE_SIZE), (number + 1) * PAGE_SIZE)
                slots = slice(page * PAGE_SIZE + (number == 0), (page + 1) * PAGE_SIZE)
                for ours, theirs in zip((drafter._cache.keys, drafter._cache.values), fresh, strict=True):
                    torch.testing.assert_close(ours[:, slots], theirs[:, at], rtol=0, atol=1e-9)
                if self.model.continues:
                    last = carry[(number + 1) * PAGE_SIZE - 2]  # the carry of entry t stands at t - 1
                    torch.testing.assert_close(drafter._page_carry[page], last, rtol=0, atol=1e-9)
        finally:
            prefixes.release(hit.pages)
        return len(hit.pages), len(drafted)


def computed_anew(
    model: ToyFeatureModel, text: list[int], gap: int = 0
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """The target's features of a text; K/V (from slot 1 on) and carries of one pass over its entries gap + 1 .."""
    alone = PagedRun(target(), capacity=len(text))
    out = alone.forward(alone.batch({0: text}), model.source.taps)
    features = torch.cat([out.taps[tap] for tap in model.source.taps], dim=1)
    theirs = PagedRun(model, capacity=len(text))  # type: ignore[arg-type]
    theirs.pages[0].sort()
    theirs.lengths[0] = 1
    batch = theirs.batch({0: text[gap + 1 :]})
    batch.positions.add_(gap - 1)
    with torch.inference_mode():
        before = torch.zeros(1, model.carry_size, dtype=torch.float64) if model.continues else None
        carry = model.catch_up(batch, features[gap:-1], before, theirs.cache).carry
    kv = theirs.cache.keys[:, PAGE_SIZE:], theirs.cache.values[:, PAGE_SIZE:]  # page 0 is not used
    return features, kv, carry


def workload(chance: random.Random, count: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            f"r{number}",
            (*[(3 * i + number % 2) % VOCAB for i in range(chance.randrange(1, 60))], number),
            SamplingParams(
                max_tokens=chance.randrange(1, 40),
                temperature=chance.choice([0.0, 0.8]),
                seed=number,
                n=chance.choice([1, 1, 3]),
                prompt_logprobs=chance.choice([None, None, 0]),
            ),
            SpeculationParams(drafters=chance.choice([None, None, ("toy",), ("garbage",), ()])),
            chance.choice(["", "", "tenant"]),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_shared_pages_hold_what_their_key_says(seed: int, continues: bool) -> None:
    """Requests come, are preempted, cancelled and end anywhere; K/V, features and carries stay those of the text."""
    chance = random.Random(seed)
    budget, pages = chance.choice([3, 20, 200]), chance.choice([9, 20, 80])
    model = ToyFeatureModel(target(), continues=continues)
    served = Served(model, num_pages=pages, max_nodes=chance.choice([5, 16, 63]), max_num_batched_tokens=budget)
    requests = workload(chance, 10)
    texts = {(r.request_id, choice): list(r.prompt_ids) for r in requests for choice in range(r.params.n)}
    salts = {r.request_id: r.cache_salt for r in requests}
    for asked in requests:
        served.engine.submit(asked)
    found = drafted = 0
    while served.engine.has_work:
        events = served.engine.step()
        if chance.random() < 0.1:
            events += served.engine.cancel(chance.choice(requests).request_id, chance.choice([None, 0, 1]))
        for event in events:
            texts[event.request_id, event.choice].extend(event.token_ids)
        if chance.random() < 0.2 or not served.engine.has_work:
            for key, text in texts.items():
                pages, with_drafts = served.check_shared_pages(text, salts[key[0]])
                found, drafted = found + pages, drafted + with_drafts
        served.engine.check()
    assert found > drafted > 0
    assert not served.made[0]._progress
    assert not served.made[0]._features._pieces


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
