"""The promise: a request's text is a function of (weights, prompt, parameters, seed) and of nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from decoding.cache import pages_for
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.engine import Engine
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sequence import SequenceId
from models.decoder import Decoder
from models.heads.eagle import EagleModel
from models.heads.eagle3 import Eagle3Model
from tests.doubles import AlternatingDrafter, GarbageDrafter, OracleDrafter
from tests.eagle import fitted_eagle, fitted_eagle3
from tests.engines import VOCAB, BuildDrafter, make_engine, run, tiny_decoder

CASES = int(os.environ.get("SACCADE_INVARIANCE_CASES", "220"))
SINGLE = ("none", "ngram", "draft", "eagle", "eagle3", "garbage", "oracle", "alternating")
PAIRS = ("draft+ngram", "eagle3+ngram", "eagle+draft", "eagle+eagle3", "eagle3+alternating")


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def draft() -> Decoder:
    return tiny_decoder(torch.float64, blur=0.05)


@cache
def eagles() -> tuple[EagleModel, Eagle3Model]:
    texts = np.random.default_rng(9).integers(0, VOCAB, (30, 60)).tolist()
    drafted = torch.arange(VOCAB)[torch.arange(VOCAB) % 4 != 1]
    return fitted_eagle(target(), texts), fitted_eagle3(target(), texts, (1, 0, 1), drafted)


@cache
def plain_engine() -> Engine:
    return make_engine(target(), prefix_caching=False)


@dataclass(frozen=True)
class Setup:
    """A server's configuration as drawn."""

    drafters: str
    max_nodes: int
    max_depth: int
    beam: int
    step_tokens: int
    spare_pages: int
    prefix_caching: bool
    max_num_seqs: int


token = st.integers(0, VOCAB - 1)
salted_prefixes = [np.random.default_rng(i).integers(0, VOCAB, 80).tolist() for i in range(3)]
prompts = st.builds(
    lambda prefix, length, tail: prefix[:length] + tail,
    st.sampled_from(salted_prefixes),
    st.integers(0, 70),
    st.lists(token, min_size=1, max_size=8),
)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 24),
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 1.5)),
    top_k=st.sampled_from([0, -1, 1, 3, 12]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.5]),
    logit_bias=st.one_of(st.just({}), st.dictionaries(token, st.floats(-5, 5), max_size=3)),
    ignore_eos=st.booleans(),
    stop_token_ids=st.one_of(st.just(()), st.tuples(token)),
    seed=st.integers(-(2**63), 2**64 - 1),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    logprobs=st.sampled_from([None, None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
)
speculation = st.builds(
    SpeculationParams,
    enabled=st.sampled_from([True, True, True, False]),
    max_nodes=st.sampled_from([None, None, 0, 1, 5]),
    max_depth=st.sampled_from([None, None, 1, 3]),
)


@st.composite
def workloads(draw: st.DrawFn) -> list[GenerateRequest]:
    requests = []
    for number in range(draw(st.sampled_from([1, 1, 2, 3, 5, 8, 16]))):
        params = draw(sampling)
        params = SamplingParams(**{**vars(params), "min_tokens": draw(st.integers(0, params.max_tokens))})
        salt = draw(st.sampled_from(["", "", "tenant"]))
        requests.append(GenerateRequest(f"r{number}", tuple(draw(prompts)), params, draw(speculation), salt))
    return requests


setups = st.builds(
    Setup,
    drafters=st.sampled_from((*SINGLE, *PAIRS, "all")),
    max_nodes=st.sampled_from([1, 2, 5, 12, 30, 63]),
    max_depth=st.sampled_from([1, 2, 4, 9]),
    beam=st.integers(1, 4),
    step_tokens=st.sampled_from([3, 17, 64, 2048]),
    spare_pages=st.sampled_from([0, 1, 3, 8, 200]),
    prefix_caching=st.booleans(),
    max_num_seqs=st.sampled_from([1, 3, 16]),
)


def drafters_of(setup: Setup, texts: dict[SequenceId, list[int]]) -> dict[str, BuildDrafter]:
    options = DraftModelOptions("", depth=4, top_k=3, beam=setup.beam)
    tree = TreeOptions("", depth=4, top_k=3, beam=setup.beam)
    table: dict[str, BuildDrafter] = {
        "ngram": lambda context: NgramDrafter(NgramOptions(), context),
        "draft": lambda context: DraftModelDrafter(options, context, draft()),
        "eagle": lambda context: FeatureDrafter(tree, context, eagles()[0]),
        "eagle3": lambda context: FeatureDrafter(tree, context, eagles()[1]),
        "garbage": GarbageDrafter,
        "oracle": lambda context: OracleDrafter(context, texts),
        "alternating": lambda context: AlternatingDrafter(context, texts),
    }
    groups: dict[str, Sequence[str]] = {"none": (), "all": tuple(table)}
    return {name: table[name] for name in groups.get(setup.drafters, setup.drafters.split("+"))}


@given(requests=workloads(), setup=setups)
@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # a failing case is small enough to read; shrinking takes minutes
)
def test_text_depends_on_the_request_alone(requests: list[GenerateRequest], setup: Setup) -> None:
    alone = {}
    for request in requests:
        alone.update(run(plain_engine(), [GenerateRequest(request.request_id, request.prompt_ids, request.params)]))
    prompt_of = {request.request_id: list(request.prompt_ids) for request in requests}
    texts = {key: prompt_of[key[0]] + outcome.tokens for key, outcome in alone.items()}

    largest = max(pages_for(len(r.prompt_ids) + r.params.max_tokens) for r in requests)
    engine = make_engine(
        target(),
        drafters_of(setup, texts),
        max_nodes=setup.max_nodes,
        max_depth=setup.max_depth,
        max_num_batched_tokens=setup.step_tokens,
        num_pages=largest + setup.spare_pages,
        prefix_caching=setup.prefix_caching,
        max_num_seqs=setup.max_num_seqs,
    )
    together = run(engine, requests)
    for key, outcome in together.items():
        judge = alone[key]
        assert outcome.tokens == judge.tokens, key
        assert outcome.last.finish_reason == judge.last.finish_reason
        assert [e.token_id for e in outcome.logprobs] == [e.token_id for e in judge.logprobs]
        np.testing.assert_allclose(
            [e.logprob for e in outcome.logprobs], [e.logprob for e in judge.logprobs], rtol=0, atol=1e-9
        )
        ours, theirs = outcome.events[0].prompt_logprobs, judge.events[0].prompt_logprobs
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(
                [e.logprob for e in ours if e], [e.logprob for e in theirs if e], rtol=0, atol=1e-9
            )
    stats = engine.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_oracle_yields_depth_plus_one_tokens_every_step(temperature: float, depth: int) -> None:
    params = SamplingParams(max_tokens=48, temperature=temperature, seed=11, ignore_eos=True)
    request = GenerateRequest("r", (3, 1, 4, 1, 5), params)
    truth = run(plain_engine(), [request])["r", 0].tokens
    texts = {("r", 0): [*request.prompt_ids, *truth]}
    engine = make_engine(target(), {"oracle": lambda c: OracleDrafter(c, texts)}, max_nodes=2 * depth, max_depth=depth)
    outcome = run(engine, [request])["r", 0]
    assert outcome.tokens == truth
    assert [len(event.token_ids) for event in outcome.events[:-1]] == [depth + 1] * (len(outcome.events) - 1)


def test_continuation_with_the_same_seed_is_the_same_text() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.9, seed=-5, ignore_eos=True)
    whole = run(plain_engine(), [GenerateRequest("a", (7, 8, 9), params)])["a", 0].tokens
    rest = SamplingParams(max_tokens=18, temperature=1.0, top_p=0.9, seed=-5, ignore_eos=True)
    continued = run(plain_engine(), [GenerateRequest("b", (7, 8, 9, *whole[:12]), rest)])["b", 0].tokens
    assert continued == whole[12:]


def test_choice_zero_is_the_single_choice() -> None:
    one = SamplingParams(max_tokens=20, temperature=1.0, seed=99, ignore_eos=True)
    three = SamplingParams(max_tokens=20, temperature=1.0, seed=99, ignore_eos=True, n=3)
    single = run(plain_engine(), [GenerateRequest("a", (2, 4), one)])
    several = run(plain_engine(), [GenerateRequest("a", (2, 4), three)])
    assert several["a", 0].tokens == single["a", 0].tokens
    assert len({tuple(several["a", choice].tokens) for choice in range(3)}) == 3
