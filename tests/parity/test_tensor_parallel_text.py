"""The text of a model on two ranks is that of one rank, whatever drafts: the demo family, in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache

import pytest

from decoding.assemble import build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.engine import Engine
from decoding.generation import Generation
from decoding.request import SamplingParams
from tests.engines import ROOT, whole
from tests.ranks import RankThreads, rank_threads

DRAFTERS = {
    "plain": (),
    "draft": ("draft",),
    "ngram": ("ngram",),
    "medusa": ("medusa",),
    "mtp": ("mtp",),
    "eagle3": ("eagle3",),
    "early exit": ("early-exit",),
    "lookahead": ("lookahead", "recycling"),
    "all": ("draft", "eagle3", "mtp", "medusa", "ngram", "early-exit"),
}
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(max_tokens=16, temperature=1.0, seed=5, ignore_eos=True, n=2, top_p=0.95)


@pytest.fixture(scope="module")
def two() -> Iterator[RankThreads]:
    with rank_threads(2) as started:
        yield started


@cache
def prompts() -> list[str]:
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"][:160] for line in lines[:30:10]]


def config_of(speculate: Sequence[str], **settings: object) -> EngineConfig:
    drafters = tuple(f"{name}={ROOT}/demo/{name}" if (ROOT / "demo" / name).is_dir() else name for name in speculate)
    given = {"dtype": "float64", "num_pages": 160, "plan": "fixed", "max_depth": 6, **settings}
    return EngineConfig(f"{ROOT}/demo/target", speculate=drafters, **given)  # type: ignore[arg-type]


def engine_of(config: EngineConfig, ranks: RankThreads | None) -> Engine:
    loaded = load_target(config, ranks)
    return Engine(config, loaded, build_stepper(config, loaded, build_drafters(config, loaded)))


def texts(engine: Engine) -> list[Generation]:
    made = [done for params in (GREEDY, DRAWN) for done in engine.generate(prompts(), params)]
    assert whole(engine)
    return made


@cache
def expected() -> list[Generation]:
    """One rank's, plain."""
    return texts(engine_of(config_of(()), None))


@pytest.mark.parametrize("name", DRAFTERS)
def test_text_is_that_of_one_rank(two: RankThreads, name: str) -> None:
    engine = engine_of(config_of(DRAFTERS[name]), two)
    assert engine.info.tensor_parallel_size == 2
    made = texts(engine)
    assert [done.token_ids for done in made] == [done.token_ids for done in expected()]
    for ours, theirs in zip(made, expected(), strict=True):
        assert [e.logprob for e in ours.logprobs or ()] == pytest.approx([e.logprob for e in theirs.logprobs or ()])
    if name != "plain":
        stats = engine.stats()
        assert stats.accepted > 0
        assert set(stats.by_drafter) >= set(DRAFTERS[name])


def test_a_draft_model_on_all_ranks(two: RankThreads) -> None:
    engine = engine_of(config_of(("draft",), tensor_parallel_size=2, draft_tensor_parallel_size=2), two)
    assert [done.token_ids for done in texts(engine)] == [done.token_ids for done in expected()]
    assert engine.stats().accepted > 0


def test_under_pressure_in_chunks_and_from_the_prefix_cache(two: RankThreads) -> None:
    asked = ["def add(left, right):\n    return left + right\n\n\ndef sub(left, right):\n", "import ", "class "]
    params = SamplingParams(max_tokens=50, temperature=0.8, seed=3, ignore_eos=True)
    truth = [done.token_ids for done in engine_of(config_of(()), None).generate(asked, params)]
    tight = {"num_pages": 9, "max_num_batched_tokens": 20, "plan": "fixed:min_probability=0"}
    engine = engine_of(config_of(("draft", "ngram"), **tight), two)
    for _ in range(2):
        assert [done.token_ids for done in engine.generate(asked, params)] == truth
        assert whole(engine)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0


def test_pages_cost_what_all_ranks_hold(two: RankThreads) -> None:
    pages = []
    for ranks in (None, two):
        engine = engine_of(config_of((), num_pages=None, kv_cache_memory=2**26), ranks)
        pages.append(engine.stats().pages_total)
    assert pages[0] == pages[1]  # half a page each
