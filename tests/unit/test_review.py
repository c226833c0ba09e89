"""Corners: K/V that is not what its key says, rows that get no turn, ends out of order, paths that few runs take."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from decoding.cache import pages_for
from decoding.drafters.base import Drafter, DrafterContext
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.engine import Engine
from decoding.errors import RequestError
from decoding.messages import TokenEvent
from decoding.page_pool import PagePool, PoolError
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from models.attention import load_backend
from models.batch import PAGE_SIZE
from models.decoder import Decoder
from models.kv_cache import KVCache
from models.layers.ops import load_ops
from models.transformers_model import load_transformers_model
from tests.doubles import GarbageDrafter, OracleDrafter
from tests.engines import ROOT, VOCAB, BuildDrafter, make_engine, run, tiny_decoder
from tests.paged import PagedRun
from tests.parity.zoo import make, save

DRAFT_BIT = 0


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def draft() -> Decoder:
    return tiny_decoder(torch.float64, layers=1, seed=7)


@cache
def plain_engine() -> Engine:
    return make_engine(target(), prefix_caching=False)


class Served:
    """An engine with all kinds of drafters, whose caches a test can look into."""

    def __init__(self, **settings: object) -> None:
        self.made: list[DraftModelDrafter] = []
        options = DraftModelOptions("", depth=4, top_k=3, beam=3, min_confidence=0.0)

        def build(context: DrafterContext) -> Drafter:
            self.made.append(DraftModelDrafter(options, context, draft()))
            return self.made[-1]

        drafters: dict[str, BuildDrafter] = {
            "draft": build,
            "ngram": lambda context: NgramDrafter(NgramOptions(), context),
            "garbage": GarbageDrafter,
        }
        self.engine = make_engine(target(), drafters, **settings)

    def check_shared_pages(self, text: list[int], salt: str) -> tuple[int, int]:
        """Compare what a prompt that begins with ``text`` would find with K/V computed anew; pages, and with drafts."""
        prefixes = self.engine._stepper.cache.prefixes
        hit = prefixes.match(np.array([*text, 0]), salt)
        try:
            drafted = [number for number, valid in enumerate(hit.valid) if valid >> DRAFT_BIT & 1]
            assert_holds(target(), self.engine._stepper.cache.kv, dict(enumerate(hit.pages)), text)
            assert_holds(draft(), self.made[0]._cache, {number: hit.pages[number] for number in drafted}, text)
        finally:
            prefixes.release(hit.pages)
        return len(hit.pages), len(drafted)


def assert_holds(model: Decoder, cache: KVCache, pages: dict[int, int], text: list[int]) -> None:
    """``pages`` of ``cache``, by their number in the text, hold its K/V."""
    if not pages:
        return
    reach = (max(pages) + 1) * PAGE_SIZE
    alone = PagedRun(model, capacity=reach)
    alone.extend([text[:reach]])
    for number, page in pages.items():
        theirs = slice(alone.pages[0][number] * PAGE_SIZE, (alone.pages[0][number] + 1) * PAGE_SIZE)
        ours = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        torch.testing.assert_close(cache.keys[:, ours], alone.cache.keys[:, theirs], rtol=0, atol=1e-9)
        torch.testing.assert_close(cache.values[:, ours], alone.cache.values[:, theirs], rtol=0, atol=1e-9)


def workload(chance: random.Random, count: int) -> list[GenerateRequest]:
    base = [3 * i % VOCAB for i in range(60)]
    return [
        GenerateRequest(
            f"r{number}",
            (*base[: chance.randrange(1, 60)], number),
            SamplingParams(
                max_tokens=chance.randrange(1, 40),
                temperature=chance.choice([0.0, 0.8]),
                seed=number,
                n=chance.choice([1, 1, 3]),
                prompt_logprobs=chance.choice([None, None, 0]),
            ),
            SpeculationParams(drafters=chance.choice([None, None, ("draft",), ("ngram", "garbage"), ()])),
            chance.choice(["", "", "tenant"]),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_shared_pages_hold_what_their_key_says(seed: int) -> None:
    """Requests come, are preempted, cancelled and end anywhere; no page that others may find holds anything else."""
    chance = random.Random(seed)
    budget, pages = chance.choice([3, 20, 200]), chance.choice([9, 20, 80])
    served = Served(num_pages=pages, max_nodes=chance.choice([5, 16, 63]), max_num_batched_tokens=budget)
    requests = workload(chance, 10)
    texts = {(r.request_id, choice): list(r.prompt_ids) for r in requests for choice in range(r.params.n)}
    open_choices = set(texts)
    salts = {r.request_id: r.cache_salt for r in requests}
    for request in requests:
        served.engine.submit(request)
    found = 0
    while served.engine.has_work:
        events = served.engine.step()
        if chance.random() < 0.1:
            events += served.engine.cancel(chance.choice(requests).request_id, chance.choice([None, 0, 1]))
        for event in events:
            key = (event.request_id, event.choice)
            assert key in open_choices, "an event after the end"
            texts[key].extend(event.token_ids)
            if event.finish_reason is not None:
                open_choices.remove(key)
        if chance.random() < 0.2 or not served.engine.has_work:
            found += sum(sum(served.check_shared_pages(text, salts[key[0]])) for key, text in texts.items())
        served.engine.check()
    assert not open_choices
    assert found > 0


def test_pages_computed_again_after_preemption_are_flagged_again() -> None:
    served = Served(max_nodes=5)
    request = GenerateRequest("a", tuple(range(40)), SamplingParams(max_tokens=60, seed=3, ignore_eos=True))
    served.engine.submit(request)
    said = [token for _ in range(6) for event in served.engine.step() for token in event.token_ids]
    scheduler, prefixes = served.engine._stepper.scheduler, served.engine._stepper.cache.prefixes
    scheduler._preempt(scheduler.running[0])
    prefixes.clear()
    while served.engine.has_work:
        said += [token for event in served.engine.step() for token in event.token_ids]
    assert said == run(plain_engine(), [request])["a", 0].tokens
    pages, drafted = served.check_shared_pages([*request.prompt_ids, *said], "")
    assert pages == (100 - 1) // PAGE_SIZE
    assert drafted >= pages - 1  # the draft may be behind by the last step


@pytest.mark.parametrize("length", range(14, 20))
def test_a_conversation_goes_on_from_pages_that_were_written(length: int) -> None:
    """A text that ends at a page's edge has not computed the K/V of its last token: its page is not to be found."""
    first = GenerateRequest("a", (7, 8), SamplingParams(max_tokens=length - 2, seed=3, ignore_eos=True))
    for speculation in (SpeculationParams(), SpeculationParams(enabled=False)):
        served = Served(max_nodes=12)
        said = run(served.engine, [GenerateRequest("a", first.prompt_ids, first.params, speculation)])["a", 0].tokens
        again = GenerateRequest("b", (7, 8, *said, 9), SamplingParams(max_tokens=20, seed=4, ignore_eos=True))
        served.check_shared_pages([7, 8, *said], "")
        assert run(served.engine, [again])["b", 0].tokens == run(plain_engine(), [again])["b", 0].tokens


def test_no_prompt_is_overtaken_forever() -> None:
    """Requests that draw come first in the token budget; they must not take all of it from a long prompt for ever."""
    engine = make_engine(target(), max_num_batched_tokens=3)
    engine.submit(GenerateRequest("long", (1,) * 40, SamplingParams(max_tokens=3, seed=1, ignore_eos=True)))
    for number in range(60):
        engine.submit(GenerateRequest(f"r{number}", (2,), SamplingParams(max_tokens=4, seed=1, ignore_eos=True)))
        if any(event.request_id == "long" for event in engine.step()):
            break
    else:
        pytest.fail("the long prompt stands still while others come and go")
    engine.close()
    engine.check()


def test_tokens_that_nobody_fetched_come_before_the_end() -> None:
    """``generate`` steps submitted requests too; cancelling one of them gives its tokens first, then its end."""
    engine = make_engine(target())
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    for name in ("a", "b"):
        engine.submit(GenerateRequest(name, (1, 2, 3), params))
    engine.generate([4, 5], SamplingParams(max_tokens=4, seed=3, ignore_eos=True))
    events = engine.cancel("a")
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["cancelled"]
    said = [token for event in events for token in event.token_ids]
    assert said == run(plain_engine(), [GenerateRequest("a", (1, 2, 3), params)])["a", 0].tokens[:4]
    rest: list[TokenEvent] = []
    while engine.has_work:
        rest += engine.step()
    assert {event.request_id for event in rest} == {"b"}
    assert sum(len(event.token_ids) for event in rest) == 30


def test_a_bad_prompt_is_a_request_error_in_process_too() -> None:
    engine = make_engine(target())
    for prompt, params in (([-1], SamplingParams()), ([2**40], SamplingParams()), ([1], SamplingParams(n=10**12))):
        with pytest.raises(RequestError):
            engine.generate(prompt, params)
        with pytest.raises(RequestError):
            next(engine.stream(prompt, SamplingParams(max_tokens=0)))
    assert not engine.has_work


def test_a_bad_stop_string_leaves_nothing_behind() -> None:
    engine = make_engine(target())
    with pytest.raises(RequestError, match="stop string"):
        engine.generate([1], stop=[""])
    assert not engine.has_work
    assert not engine._local


def test_a_lost_page_is_noticed_when_the_engine_comes_to_rest() -> None:
    pool = PagePool(4)
    pool.check_idle()
    pool.take(1)
    with pytest.raises(PoolError, match="1 pages are held"):
        pool.check_idle()
    engine = make_engine(target(), num_pages=9)
    engine._stepper.cache.prefixes.pool.take(1)
    with pytest.raises(PoolError):
        engine.generate([1, 2, 3])


def test_more_logprobs_than_token_ids() -> None:
    """A vocabulary smaller than what a client may ask for gives what there is."""
    small = tiny_decoder(torch.float64)
    small.vocab_size = 12  # the ids that can be drawn
    outcome = run(make_engine(small), [GenerateRequest("a", (1, 2), SamplingParams(logprobs=20, prompt_logprobs=20))])
    assert [len(entry.top) for entry in outcome["a", 0].logprobs] == [12] * len(outcome["a", 0].tokens)


def test_the_last_page_of_the_pool_is_enough() -> None:
    """prompt + max_tokens fill the pool to the last slot: trees and drafting find no room, and the text still comes."""
    params = SamplingParams(max_tokens=32, temperature=0.8, seed=5, ignore_eos=True, n=2)
    request = GenerateRequest("a", tuple(range(16)), params)
    served = Served(num_pages=pages_for(48), max_nodes=63)
    ours, theirs = run(served.engine, [request]), run(plain_engine(), [request])
    assert [ours["a", i].tokens for i in (0, 1)] == [theirs["a", i].tokens for i in (0, 1)]


def test_a_draft_of_shorter_context_and_other_shape() -> None:
    """It drafts up to the end of its own context and is silent beyond; its trees stay within its RoPE table."""
    short = tiny_decoder(torch.float64, layers=1)
    short.max_model_len = 24
    options = DraftModelOptions("", depth=8, beam=3, min_confidence=0.0)
    engine = make_engine(target(), {"draft": lambda context: DraftModelDrafter(options, context, short)}, max_nodes=30)
    requests = [
        GenerateRequest(f"r{n}", tuple(range(n, n + length)), SamplingParams(max_tokens=40, seed=n, ignore_eos=True))
        for n, length in enumerate((1, 8, 20, 23, 24, 25, 40))
    ]
    outcomes = run(engine, requests)
    for request in requests:
        assert outcomes[request.request_id, 0].tokens == run(plain_engine(), [request])[request.request_id, 0].tokens
    drafted = [outcomes[request.request_id, 0].last.speculation.drafted for request in requests]  # type: ignore[union-attr]
    assert all(drafted[:5])
    assert drafted[5:] == [0, 0]


def test_the_promise_holds_without_the_fused_kernels(tmp_path: Path) -> None:
    """Where nothing can be compiled, and on CUDA, all is plain PyTorch: the same property of the same engine."""
    program = (
        "import sys, pytest; from models import kernels; assert not kernels.load(); "
        "sys.exit(pytest.main(['-x', '-p', 'no:cacheprovider', 'tests/property/test_invariance.py']))"
    )
    env = {**os.environ, "CXX": "/bin/false", "SACCADE_CACHE": str(tmp_path), "SACCADE_INVARIANCE_CASES": "20"}
    ended = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_drafts_do_not_change_the_text_of_a_transformers_model(family: str, tmp_path: Path) -> None:
    """Position tables, windows shorter than the text, experts: as targets under trees, and as a draft of themselves."""
    folder = save(make(family), tmp_path)
    model = load_transformers_model(
        folder, dtype="float64", device=torch.device("cpu"), attention="auto", max_model_len=None
    )
    options = DraftModelOptions("", depth=4, top_k=3, beam=3)
    drafters: dict[str, BuildDrafter] = {
        "draft": lambda context: DraftModelDrafter(options, context, model),
        "garbage": GarbageDrafter,
    }
    engine = make_engine(model, drafters, max_nodes=30, num_pages=12, max_num_batched_tokens=50)
    plain = make_engine(model, prefix_caching=False)
    for number, temperature in enumerate((0.0, 0.8)):
        prompt = tuple((5 * i + number) % VOCAB for i in range(40))
        params = SamplingParams(max_tokens=30, temperature=temperature, seed=number, n=2, ignore_eos=True)
        request = GenerateRequest("a", prompt, params)
        ours, theirs = run(engine, [request]), run(plain, [request])
        assert [ours["a", i].tokens for i in (0, 1)] == [theirs["a", i].tokens for i in (0, 1)]
    by_drafter = engine.stats().by_drafter
    assert by_drafter["draft"].accepted > by_drafter["draft"].drafted / 2


def test_trees_under_a_sliding_window() -> None:
    """Keys of a tree have the positions of their depths: a window cuts among them as it does in a chain."""
    config = dataclasses.replace(target().config, windows=(7, None))
    cpu = torch.device("cpu")
    ops, attention = load_ops(cpu, torch.float64), load_backend("auto", cpu, torch.float64)
    model = Decoder(config, ops, attention, cpu, torch.float64)
    generator = torch.Generator().manual_seed(3)
    for weight in model.weights().values():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.2 * drawn if weight.dim() == 1 else 0.35 * drawn)
    model.pack()
    params = SamplingParams(max_tokens=60, temperature=0.8, seed=2, ignore_eos=True)
    request = GenerateRequest("a", (3, 1, 4, 1, 5), params)
    text = run(make_engine(model), [request])["a", 0].tokens
    known = {("a", 0): [*request.prompt_ids, *text]}
    drafters: dict[str, BuildDrafter] = {
        "garbage": GarbageDrafter,
        "oracle": lambda context: OracleDrafter(context, known),
    }
    engine = make_engine(model, drafters, max_nodes=40, max_depth=12)
    assert run(engine, [request])["a", 0].tokens == text
    assert engine.stats().by_drafter["oracle"].accepted > 40
