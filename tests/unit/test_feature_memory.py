"""What a feature drafter leaves in the pages, K/V, features and carries, against the same computed anew."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.drafters.base import Drafter, DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from models.batch import PAGE_SIZE
from models.decoder import Decoder
from tests.doubles import GarbageDrafter
from tests.engines import VOCAB, BuildDrafter, make_engine, run, tiny_decoder
from tests.feature_doubles import ToyFeatureModel
from tests.paged import PagedRun


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


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

    def read(self) -> None:
        """What the next step begins with."""
        with torch.inference_mode():
            self.engine._stepper._read_prompts()

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
    model: ToyFeatureModel, text: list[int], gap: range = range(0)
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """The target's features of a text; K/V (from slot 1 on) and carries of one pass over its entries beside a gap."""
    alone = PagedRun(target(), capacity=len(text))
    out = alone.forward(alone.batch({0: text}), model.source.taps)
    features = torch.cat([out.taps[tap] for tap in model.source.taps], dim=1)
    theirs = PagedRun(model, capacity=len(text))  # type: ignore[arg-type]
    theirs.pages[0].sort()
    theirs.lengths[0] = 1
    entries = [at for at in range(len(text)) if at not in gap][1:]
    batch = theirs.batch({0: [text[at] for at in entries]})
    batch.positions.sub_(1)
    with torch.inference_mode():
        before = torch.zeros(1, model.carry_size, dtype=torch.float64) if model.continues else None
        carry = model.catch_up(batch, features[torch.tensor(entries) - 1], before, theirs.cache).carry
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


@pytest.mark.parametrize(("kept", "continues", "window"), [(0, True, None), (1, False, None), (1, False, 12)])
def test_k_v_behind_a_gap(kept: int, continues: bool, window: int | None) -> None:
    """It is that of a text without the gap, whose positions close up: windows reach over it."""
    model = ToyFeatureModel(target(), continues=continues)
    for layer in model.body.layers:
        layer.spec = replace(layer.spec, window=window)
    served = Served(model)
    params = SamplingParams(30, 0.8, seed=1, ignore_eos=True)
    prompt = tuple(5 * i * i % VOCAB for i in range(40))
    run(served.engine, [GenerateRequest("with", prompt[: kept * PAGE_SIZE], SamplingParams(1))] if kept else [])
    run(served.engine, [GenerateRequest("without", prompt, params, SpeculationParams(enabled=False))])
    for name in ("a", "b"):
        served.engine.submit(GenerateRequest(name, prompt, params))
    while served.engine.has_work:
        served.engine.step()
        served.read()
        for sequence in served.engine._sequences.values():
            progress = served.made[0]._progress[sequence.id]
            assert (progress.kept, progress.base) == (kept, 2)
            assert served.made[0].valid_length(sequence) == kept * PAGE_SIZE
            text = sequence.tokens[: progress.end].tolist()
            gap = range(kept * PAGE_SIZE, 32)
            _, (keys, values), _ = computed_anew(model, text, gap)
            entries = [at for at in range(progress.end) if at not in gap][1:]
            slots = [sequence.pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in entries]
            for ours, theirs in zip(
                (served.made[0]._cache.keys, served.made[0]._cache.values), (keys, values), strict=True
            ):
                torch.testing.assert_close(ours[:, slots], theirs[:, 1 : 1 + len(entries)], rtol=0, atol=1e-9)
    assert served.engine.stats().by_drafter["toy"].accepted > 0


def test_who_continues_a_text_finds_no_page_that_the_drafter_lacks() -> None:
    """The last step's tokens are never run by the drafter: a page that they fill is not left behind."""
    prompt, withheld = tuple(range(5, 23)), 0
    for length in range(1, 36):
        served = Served(ToyFeatureModel(target()))
        request = GenerateRequest("r", prompt, SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True))
        [outcome] = run(served.engine, [request]).values()
        text = [*prompt, *outcome.tokens]
        pages, drafted = served.check_shared_pages(text)
        assert pages == drafted, length
        full = (len(text) - 1) // PAGE_SIZE
        assert full - 1 <= pages <= full
        withheld += full - pages
    assert 0 < withheld < 20


def test_chunks_of_prompts_do_not_stay_in_memory() -> None:
    """While chunks take the whole budget nobody drafts, and what decoding rows keep piles up: it is theirs alone."""
    model = ToyFeatureModel(target())
    served = Served(model, max_num_batched_tokens=64, prefix_caching=False)
    params = SamplingParams(40, 0.8, seed=1, ignore_eos=True)
    for number, length in enumerate((5, 250, 250, 250)):
        prompt = tuple((5 * i * i + number) % VOCAB for i in range(length))
        served.engine.submit(GenerateRequest(f"r{number}", prompt, params))
    most = 0
    while served.engine.has_work:
        served.engine.step()
        served.read()
        pieces = [piece for each in served.made[0]._features._pieces.values() for piece in each]
        most = max(most, len(pieces))
        for piece in pieces:
            alive = piece.features.untyped_storage().nbytes() // (model.feature_size * model.dtype.itemsize)
            assert alive < 40, "the paths of its step, not the chunk of 60 tokens beside them"
    assert most > 10


def test_what_it_keeps_with_each_page_is_in_the_price_of_a_page() -> None:
    for continues in (False, True):
        served = Served(ToyFeatureModel(target(), continues=continues), kv_cache_memory=2**22, num_pages=None)
        drafter, pages = served.made[0], served.engine.stats().pages_total
        kept = drafter._features._pages.nbytes + drafter._page_carry.nbytes
        assert kept == pages * drafter.needs.page_bytes
        caches = (served.engine._stepper.cache.kv, drafter._cache)
        spent = kept + sum(kv.keys.nbytes + kv.values.nbytes for kv in caches)
        assert 2**22 - spent // pages < spent <= 2**22
