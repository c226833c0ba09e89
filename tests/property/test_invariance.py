"""The promise: a request's text is a function of (weights, prompt, parameters, seed) and of nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from decoding.acceptance import Acceptance
from decoding.cache import pages_for
from decoding.drafters.base import DrafterContext
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.drafters.lookahead import LookaheadDrafter, LookaheadOptions
from decoding.drafters.medusa import CALIBRATED, PROBABILITY, MedusaDrafter, MedusaOptions
from decoding.drafters.mtp import MTPOptions, parallel_drafter
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.drafters.prediction import PredictionDrafter, PredictionOptions
from decoding.drafters.product_tree import FixedTrees, ProbableTrees
from decoding.drafters.recycling import RecyclingDrafter, RecyclingOptions
from decoding.engine import Engine
from decoding.request import GREEDY_TEMPERATURE, GenerateRequest, Reasoning, SamplingParams, SpeculationParams
from decoding.sequence import SequenceId
from models.decoder import Decoder
from models.early_exit import ExitModel
from models.graphs import EagerCapture
from models.heads.eagle import EagleModel
from models.heads.eagle3 import Eagle3Model
from models.heads.feature_model import FeatureModel
from models.heads.medusa import MedusaHeads
from models.heads.mtp import MTPModel
from models.heads.parallel_heads import ParallelHeads
from tests.doubles import AlternatingDrafter, GarbageDrafter, OracleDrafter
from tests.eagle import fitted_eagle, fitted_eagle3
from tests.engines import EOS, VOCAB, BuildDrafter, device_ops, make_engine, run, tiny_decoder
from tests.feature_doubles import ToyFeatureModel
from tests.grammars import GRAMMARS, fulfils, said, spelled
from tests.medusa import fit_weights, make_heads
from tests.moods import make_moody
from tests.mtp import fitted_model, random_heads

CASES = int(os.environ.get("SACCADE_INVARIANCE_CASES", "220"))


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
def mtp(modules: int) -> MTPModel:
    texts = np.random.default_rng(9).integers(0, VOCAB, (30, 60)).tolist()
    return fitted_model(target(), texts, modules)


@cache
def medusa_heads() -> MedusaHeads:
    texts = np.random.default_rng(9).integers(0, VOCAB, (30, 60)).tolist()
    assert target().head.weight is not None
    return make_heads(target(), fit_weights(target(), texts, target().head.weight, 3))


@cache
def heads() -> ParallelHeads:
    return random_heads(target(), 3)


@cache
def continuing() -> ToyFeatureModel:
    """Reads what it made of the token before, as the second of several modules does."""
    return ToyFeatureModel(target(), continues=True)


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
    as_on_cuda: bool  # recorded passes padded to buckets, trees padded to bounds, nothing that waits
    plan: str
    mood: int  # of the prices that an auto plan is told; 0: those that it is born with


OFF = SpeculationParams(enabled=False)
TYPICAL = Acceptance("typical", epsilon=0.05)
token = st.integers(0, VOCAB - 1)
salted_prefixes = [np.random.default_rng(i).integers(0, VOCAB, 80).tolist() for i in range(3)]
prompts = st.builds(
    lambda prefix, length, tail: prefix[:length] + tail,
    st.sampled_from(salted_prefixes),
    st.integers(0, 70),
    st.lists(token, min_size=1, max_size=8),
)
words = st.lists(token, min_size=1, max_size=3).map(tuple)
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
    allowed_token_ids=st.one_of(
        st.just(()), st.just(()), st.lists(token, min_size=9, max_size=20, unique=True).map(tuple)
    ),
    bad_words=st.one_of(st.just(()), st.lists(words, max_size=3).map(tuple)),
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
    acceptance=st.sampled_from([None, None, None, TYPICAL, replace(TYPICAL, bonus="argmax")]),
    coupling=st.sampled_from([None, None, True, False]),
    trace=st.sampled_from([False, False, True]),
)


@st.composite
def workloads(draw: st.DrawFn) -> list[GenerateRequest]:
    requests = []
    for number in range(draw(st.sampled_from([1, 1, 2, 3, 5, 8, 16]))):
        params = draw(sampling)
        params = SamplingParams(**{**vars(params), "min_tokens": draw(st.integers(0, params.max_tokens))})
        salt = draw(st.sampled_from(["", "", "tenant"]))
        grammar = draw(st.sampled_from([*[None] * 14, *GRAMMARS]))
        given = tuple(draw(prompts)), params, draw(speculation), salt
        thought = draw(st.sampled_from([None, None, Reasoning(7), Reasoning(7, 9)])) if grammar else None
        requests.append(GenerateRequest(f"r{number}", *given, grammar=grammar, reasoning=thought))
    return requests


Texts = dict[SequenceId, list[int]]  # prompt and true continuation of every choice


def draft_drafter(setup: Setup) -> BuildDrafter:
    options = DraftModelOptions("", depth=4, top_k=3, beam=setup.beam)
    return lambda context: DraftModelDrafter(options, context, draft())


def early_exit(setup: Setup) -> BuildDrafter:
    options = EarlyExitOptions(depth=4, top_k=3, beam=setup.beam, min_confidence=0.1, exit_layer=1)
    return lambda context: EarlyExitDrafter(options, context, ExitModel(target(), 1))


def feature_drafter(setup: Setup, model: FeatureModel) -> BuildDrafter:
    options = TreeOptions("", depth=4, top_k=3, beam=setup.beam)
    return lambda context: FeatureDrafter(options, context, model)


def medusa(setup: Setup, *, fixed: bool) -> BuildDrafter:
    choices = [(0,), (2,), (0, 1), (2, 0), (2, 0, 5)]
    cpu, options = target().device, MedusaOptions(tree=CALIBRATED if fixed else PROBABILITY, tau=0.5)
    shape = FixedTrees(choices, cpu) if fixed else ProbableTrees(3, 1 + setup.beam, cpu)
    return lambda context: MedusaDrafter(options, context, medusa_heads(), shape)


def parallel_heads(setup: Setup) -> BuildDrafter:
    return lambda context: parallel_drafter(MTPOptions(top_k=3), context, heads())


def recycling(setup: Setup) -> BuildDrafter:
    def build(context: DrafterContext) -> RecyclingDrafter:
        device = torch.device("cuda") if setup.as_on_cuda else context.device  # learns a step later there
        return RecyclingDrafter(RecyclingOptions(), replace(context, device=device))

    return build


# a drafter is one line here; pairs join two of them by "+"
DRAFTERS: dict[str, Callable[[Setup, Texts], BuildDrafter]] = {
    "ngram": lambda setup, texts: lambda context: NgramDrafter(NgramOptions(), context),
    "prediction": lambda setup, texts: lambda context: PredictionDrafter(PredictionOptions(), context),
    "lookahead": lambda setup, texts: lambda context: LookaheadDrafter(LookaheadOptions(4, 1 + setup.beam, 3), context),
    "recycling": lambda setup, texts: recycling(setup),
    "draft": lambda setup, texts: draft_drafter(setup),
    "early exit": lambda setup, texts: early_exit(setup),
    "eagle": lambda setup, texts: feature_drafter(setup, eagles()[0]),
    "eagle3": lambda setup, texts: feature_drafter(setup, eagles()[1]),
    "medusa": lambda setup, texts: medusa(setup, fixed=False),
    "medusa fixed": lambda setup, texts: medusa(setup, fixed=True),
    "mtp": lambda setup, texts: feature_drafter(setup, mtp(1)),
    "mtp of two": lambda setup, texts: feature_drafter(setup, mtp(2)),
    "parallel": lambda setup, texts: parallel_heads(setup),
    "continuing": lambda setup, texts: feature_drafter(setup, continuing()),
    "garbage": lambda setup, texts: GarbageDrafter,
    "oracle": lambda setup, texts: lambda context: OracleDrafter(context, texts),
    "alternating": lambda setup, texts: lambda context: AlternatingDrafter(context, texts),
}
PAIRS = (
    "draft+ngram",
    "draft+prediction",
    "lookahead+alternating",
    "lookahead+ngram",
    "medusa fixed+lookahead",
    "recycling+ngram",
    "eagle3+ngram",
    "eagle+draft",
    "eagle+eagle3",
    "eagle3+alternating",
    "continuing+alternating",
    "mtp of two+ngram",
    "mtp+parallel",
    "medusa+ngram",
    "medusa fixed+draft",
    "medusa fixed+alternating",
    "early exit+ngram",
    "early exit+draft",
    "early exit+alternating",
)

setups = st.builds(
    Setup,
    drafters=st.sampled_from(("none", *DRAFTERS, *PAIRS, "all")),
    max_nodes=st.sampled_from([1, 2, 5, 12, 30, 63]),
    max_depth=st.sampled_from([1, 2, 4, 9]),
    beam=st.integers(1, 4),
    step_tokens=st.sampled_from([3, 17, 64, 2048]),
    spare_pages=st.sampled_from([0, 1, 3, 8, 200]),
    prefix_caching=st.booleans(),
    max_num_seqs=st.sampled_from([1, 3, 16]),
    as_on_cuda=st.sampled_from([False, False, True]),
    plan=st.sampled_from(["fixed", "fixed:min_probability=0", "auto", "auto", "auto"]),
    mood=st.integers(0, 20),
)


def drafters_of(setup: Setup, texts: Texts) -> dict[str, BuildDrafter]:
    groups: dict[str, Sequence[str]] = {"none": (), "all": tuple(DRAFTERS)}
    names = groups.get(setup.drafters, setup.drafters.split("+"))
    return {name: DRAFTERS[name](setup, texts) for name in names}


def predicting(request: GenerateRequest, texts: Texts) -> GenerateRequest:
    """The request with a prediction: the true text of its first choice, with tokens changed, doubled and left out."""
    truth = texts[request.request_id, 0][len(request.prompt_ids) :]
    changed = [(token + 1) % VOCAB if place % 9 == 4 else token for place, token in enumerate(truth)]
    edited = [token for place, token in enumerate(changed) for _ in range((1, 1, 1, 1, 1, 0, 1, 2)[place % 8])]
    return replace(request, prediction_ids=tuple(edited))


def is_lossy(request: GenerateRequest) -> bool:
    typical = request.speculation.acceptance is not None and request.speculation.enabled
    return typical and request.params.temperature >= GREEDY_TEMPERATURE


def assert_bans_hold(params: SamplingParams, output: list[int]) -> None:
    assert not params.allowed_token_ids or set(output) <= set(params.allowed_token_ids)
    for word in params.bad_words:
        assert word not in {tuple(output[i : i + len(word)]) for i in range(len(output))}


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
        held = {"grammar": request.grammar, "reasoning": request.reasoning}
        plain = GenerateRequest(request.request_id, request.prompt_ids, request.params, OFF, **held)  # type: ignore[arg-type]
        alone.update(run(plain_engine(), [plain]))
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
        ops=device_ops() if setup.as_on_cuda else None,
        capture=EagerCapture() if setup.as_on_cuda else None,
        plan=setup.plan,
    )
    if setup.mood:
        make_moody(engine, setup.mood)
    together = run(engine, [predicting(request, texts) for request in requests])
    lossy = {request.request_id for request in requests if is_lossy(request)}
    held_to = {request.request_id: (request.grammar, request.reasoning) for request in requests}
    for key, outcome in together.items():
        judge, (grammar, reasoning) = alone[key], held_to[key[0]]
        if grammar is not None and outcome.last.finish_reason == "stop" and outcome.tokens[-1] == EOS:
            assert fulfils(spelled(said(outcome.tokens, reasoning)), grammar)
        assert outcome.last.speculation is not None
        assert outcome.last.speculation.acceptance == ("typical" if key[0] in lossy else "exact")
        if key[0] in lossy:  # has a text of its own, and changes nobody else's
            continue
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
    for request in requests:
        for choice in range(request.params.n if request.grammar is None else 0):  # a grammar wins over bans
            assert_bans_hold(request.params, together[request.request_id, choice].tokens)
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
