"""Every drafter of the table: what it proposes, what it survives, and that it changes no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from decoding.assemble import LoadedModel, build_drafters, build_stepper, load_target
from decoding.batcher import Nodes
from decoding.config import EngineConfig
from decoding.drafters import DRAFTERS, DrafterChoice
from decoding.drafters.base import Drafter, DrafterContext
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import RaggedBatch
from models.kv_cache import KVCache
from models.target import ForwardOutput
from models.tree import GUESSED, PINS, Trees, is_node
from tests.datastore import demo_datastore
from tests.doubles import GarbageDrafter
from tests.eagle import demo_eagle
from tests.engines import ROOT, run

DRAFT = f"draft={ROOT}/demo/draft"


# how each drafter is asked for on the command line; it must draft for the demo target
EXAMPLES: dict[str, Callable[[], str]] = {
    "ngram": lambda: "ngram",
    "prediction": lambda: "prediction",  # follows what every request of these tests predicts
    "recycling": lambda: "recycling",
    "lookahead": lambda: "lookahead",
    "draft": lambda: DRAFT,
    "medusa": lambda: f"medusa={ROOT}/demo/medusa:tau=0.3",
    "mtp": lambda: f"mtp={ROOT}/demo/mtp",
    "eagle": lambda: f"eagle={demo_eagle()}:tau=0.5",
    "eagle3": lambda: f"eagle3={ROOT}/demo/eagle3",
    "suffix": lambda: "suffix",
    "retrieval": lambda: f"retrieval={demo_datastore()}",
    "early-exit": lambda: f"early-exit={ROOT}/demo/early-exit",
}


@pytest.fixture(params=list(DRAFTERS))
def example(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in EXAMPLES:
        pytest.fail(f"add to EXAMPLES of {__file__} how --speculate {name} drafts for the demo target")
    return EXAMPLES[name]()


def examples() -> tuple[str, ...]:
    return tuple(example() for example in EXAMPLES.values())


@cache
def demo() -> LoadedModel:
    return load_target(EngineConfig(f"{ROOT}/demo/target", dtype="float32"))


@cache
def prompts() -> list[tuple[int, ...]]:
    """Beginnings of source files, some long enough for a prompt of several chunks."""
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(line)["prompt"] for line in lines]
    ids = [tuple(demo().tokenizer.encode(text)) for text in texts]
    return [tokens[: 20 + 25 * number] for number, tokens in enumerate(ids)]


class Watched:
    """A drafter whose every proposal is checked on its way out."""

    def __init__(self, inner: Drafter, bit: int, vocab_size: int) -> None:
        self.inner = inner
        self.name, self.needs, self.max_depth = inner.name, inner.needs, inner.max_depth
        self.proposals = 0
        self._bit = bit
        self._vocab_size = vocab_size

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        self.inner.attach(num_pages, target_kv)

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        assert 0 <= cached_tokens <= sequence.cached
        self.inner.admit(sequence, cached_tokens)
        assert self.inner.valid_length(sequence) in (0, cached_tokens)

    def ready(self, sequence: Sequence) -> bool:
        return self.inner.ready(sequence)

    def backlog(self, sequence: Sequence) -> int:
        tokens = self.inner.backlog(sequence)
        assert 0 <= tokens <= sequence.length
        return tokens

    def scratch_slots(self, depth: int) -> int:
        slots = self.inner.scratch_slots(depth)
        assert slots >= 0
        return slots

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = self.inner.propose(plan, quota, sampling)
        for row in plan.rows:
            assert self.inner.valid_length(row.sequence) <= row.end, "K/V of tokens that are not there"
        if trees is None:
            return None
        trees.validate()
        last = [int(row.sequence.tokens[-1]) for row in plan.deciding]
        assert trees.tokens[:, 0].tolist() == last, "one row per deciding row, in their order"
        assert (trees.confidence[:, 0] == 1).all()
        nodes = is_node(trees)
        assert (trees.tokens[nodes] < self._vocab_size).all()
        pinned = trees.source >> PINS
        assert (((trees.source & GUESSED) | pinned) == (1 << self._bit) * nodes).all(), "it speaks for itself only"
        assert self.needs.pins or not pinned.any()
        for row, limit in enumerate(quota.rows):
            if not limit.nodes or self.name not in limit.drafters:
                assert not nodes[row].any(), "it drafts only where it is asked to"
            columns = nodes[row].nonzero().flatten()
            children = list(zip(trees.parents[row, columns].tolist(), trees.tokens[row, columns].tolist(), strict=True))
            assert len(set(children)) == len(children), "siblings differ"
            self.proposals += len(children)
        return trees

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        batch.validate()
        self.inner.observe(plan, batch, nodes, out, verdict)

    def read_prompts(self) -> list[Sequence]:
        return self.inner.read_prompts()

    def valid_length(self, sequence: Sequence) -> int:
        return self.inner.valid_length(sequence)

    def forget(self, sequence: SequenceId) -> None:
        self.inner.forget(sequence)

    def close(self) -> None:
        self.inner.close()


def build(examples: tuple[str, ...], *, other: bool = False, **settings: object) -> tuple[Engine, list[Watched]]:
    """An engine on the demo target with watched drafters and, if asked for, a second one called "other"."""
    loaded = demo()
    # with fixed trees, so that every drafter drafts, whether it pays or not
    settings = {"plan": "fixed", **settings}
    config = EngineConfig(f"{ROOT}/demo/target", dtype="float32", speculate=examples, **settings)  # type: ignore[arg-type]
    drafters = build_drafters(config, loaded)
    watched = [Watched(drafter, bit, loaded.vocab_size) for bit, drafter in enumerate(drafters)]
    everyone: list[Drafter] = [*watched]
    if other:
        everyone.append(
            GarbageDrafter(
                DrafterContext(
                    name="other",
                    bit=len(watched),
                    target=loaded.target,
                    tokenizer=loaded.tokenizer,
                    dtype=loaded.target.dtype,
                    device=loaded.target.device,
                    attention="auto",
                    max_model_len=loaded.target.max_model_len,
                    max_step_tokens=config.max_num_batched_tokens,
                )
            )
        )
    return Engine(config, loaded, build_stepper(config, loaded, everyone)), watched


@cache
def plain() -> Engine:
    return build((), prefix_caching=False)[0]


@cache
def plain_text(prompt: tuple[int, ...], temperature: float, seed: int, max_tokens: int) -> list[int]:
    params = SamplingParams(max_tokens, temperature, seed=seed, ignore_eos=True)
    return run(plain(), [GenerateRequest("plain", prompt, params)])["plain", 0].tokens


def predicted(prompt: tuple[int, ...], temperature: float, seed: int, max_tokens: int) -> tuple[int, ...]:
    """The text that will come, with some tokens wrong."""
    text = plain_text(prompt, temperature, seed, max_tokens)
    return tuple(9 if place % 13 == 5 else token for place, token in enumerate(text))


def mixed_requests(name: str) -> list[GenerateRequest]:
    """Rows of all kinds: with this drafter, with another, with both, without; limited; long prompts and short."""
    wishes = [
        SpeculationParams(),
        SpeculationParams(drafters=(name,)),
        SpeculationParams(enabled=False),
        SpeculationParams(drafters=("other",)),
        SpeculationParams(max_nodes=3),
        SpeculationParams(max_depth=1),
        SpeculationParams(max_nodes=0),
        SpeculationParams(),
    ]
    return [
        GenerateRequest(
            f"r{number}",
            prompt,
            SamplingParams(40, temperature, seed=number, ignore_eos=True),
            wish,
            prediction_ids=predicted(prompt, temperature, number, 40),
        )
        for number, (prompt, wish, temperature) in enumerate(zip(prompts(), wishes, (0.0, 0.8) * 4, strict=True))
    ]


def test_a_mixed_batch(example: str) -> None:
    """Chunked and repeated prompts, preemption: ``Watched`` checks the proposals, plain decoding judges the text."""
    name = DrafterChoice.parse(example).name
    engine, (watched,) = build((example,), other=True, num_pages=18, max_num_batched_tokens=60, max_nodes=12)
    requests = mixed_requests(name)
    for turn in range(2):
        outcomes = run(engine, [replace(request, request_id=f"{request.request_id}.{turn}") for request in requests])
        for request in requests:
            outcome = outcomes[f"{request.request_id}.{turn}", 0]
            params = request.params
            expected = plain_text(request.prompt_ids, params.temperature, params.seed or 0, params.max_tokens)
            assert outcome.tokens == expected
            stats = outcome.last.speculation
            assert stats is not None
            wish = request.speculation
            if not wish.enabled or wish.max_nodes == 0:
                assert stats.drafted == 0
            if wish.drafters is not None:
                asked = {who: there.drafted for who, there in stats.by_drafter.items() if there.drafted}
                assert set(asked) <= set(wish.drafters)
    assert watched.proposals > 0
    stats = engine.stats()
    assert stats.preemptions > 0, "the pool is meant to be too small"
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_cancelled_requests_are_forgotten_and_their_names_reused(example: str) -> None:
    engine, (watched,) = build((example,), max_num_batched_tokens=100)
    requests = mixed_requests(DrafterChoice.parse(example).name)
    requests = [r for r in requests if r.speculation.drafters != ("other",)]
    for stop_after in (1, 2, 5):
        for request in requests:
            engine.submit(request)
        for _ in range(stop_after):
            engine.step()
        sequences = list(engine._sequences.values())
        for request in requests:
            engine.cancel(request.request_id)
            engine.check()
        assert not any(watched.inner.valid_length(sequence) for sequence in sequences)
    outcomes = run(engine, requests)
    for request in requests:
        params = request.params
        expected = plain_text(request.prompt_ids, params.temperature, params.seed or 0, params.max_tokens)
        assert outcomes[request.request_id, 0].tokens == expected


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_that_of_plain_decoding(example: str, temperature: float) -> None:
    engine, (watched,) = build((example,))
    for number, prompt in enumerate(prompts()[4:7]):
        params = SamplingParams(60, temperature, seed=number, ignore_eos=True)
        guess = predicted(prompt, temperature, number, 60)
        outcome = run(engine, [GenerateRequest("r", prompt, params, prediction_ids=guess)])["r", 0]
        assert outcome.tokens == plain_text(prompt, temperature, number, 60)
        assert [len(event.token_ids) for event in outcome.events] != [1] * 60, "something is accepted"
    assert watched.proposals > 0


def test_all_drafters_together_change_nothing() -> None:
    if missing := set(DRAFTERS) - set(EXAMPLES):
        pytest.fail(f"add {', '.join(missing)} to EXAMPLES of {__file__}")
    engine, watched = build(examples(), max_nodes=40)
    prompt = prompts()[5]
    for temperature in (0.0, 0.8):
        params = SamplingParams(60, temperature, seed=5, ignore_eos=True)
        request = GenerateRequest("r", prompt, params, prediction_ids=predicted(prompt, temperature, 5, 60))
        outcome = run(engine, [request])["r", 0]
        assert outcome.tokens == plain_text(prompt, temperature, 5, 60)
        stats = outcome.last.speculation
        assert stats is not None
        assert set(stats.by_drafter) == set(DRAFTERS)
        assert stats.drafted <= sum(there.drafted for there in stats.by_drafter.values()), "shared nodes count once"
    assert all(drafter.proposals for drafter in watched)


# the command line ----------------------------------------------------------------------------------------------------


def test_options_are_read() -> None:
    choice = DrafterChoice.parse("ngram:max_match=3,branches=2")
    assert (choice.name, choice.options.max_match, choice.options.branches) == ("ngram", 3, 2)
    choice = DrafterChoice.parse("draft=/models/a:b:tau=0.5,depth=2")
    assert (choice.options.path, choice.options.tau, choice.options.depth) == ("/models/a:b", 0.5, 2)
    assert DrafterChoice.parse("draft=/models/a:b").options.path == "/models/a:b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngrm", "unknown drafter 'ngrm'.*did you mean 'ngram'"),
        ("", "unknown drafter ''"),
        ("medusa-9000", "there are: .*ngram"),
        ("draft", "draft needs a checkpoint: --speculate draft=PATH"),
        ("draft:depth=3", "draft needs a checkpoint"),
        ("ngram=/some/path", "ngram takes no path"),
        ("ngram:max_mach=3", "no option 'max_mach': did you mean 'max_match'"),
        ("draft=x:path=y", "no option 'path'"),
        ("ngram:max_match=many", "option max_match of drafter 'ngram' must be int, not 'many'"),
        ("ngram:max_match=2.5", "must be int, not '2.5'"),
        ("draft=x:tau=warm", "option tau of drafter 'draft' must be float"),
    ],
)
def test_bad_choices_name_the_fix(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DrafterChoice.parse(text)


@pytest.mark.parametrize(
    ("speculate", "message"),
    [
        (("ngram", "ngram:max_match=2"), "--speculate ngram is given twice"),
        (("ngram:max_match=0",), "1 <= min_match <= max_match <= 64"),
        (("ngram:min_match=33",), "1 <= min_match <= max_match <= 64"),
        (("ngram:branches=0",), "branches must be at least 1"),
        (("prediction:branches=0",), "branches must be at least 1"),
        (("prediction:max_match=65",), "max_match must be in 1 .. 64"),
        (("recycling:top_k=0",), "top_k must be from 1 to 64"),
        (("recycling:nodes=64",), "nodes must be from 1 to 63"),
        (("recycling:salts=0",), "salts must be at least 1"),
        (("lookahead:level=2",), "level must be at least 3"),
        (("lookahead:window_size=0",), "window_size and guess_set_size must be at least 1"),
        (("lookahead:guess_set_size=0",), "window_size and guess_set_size must be at least 1"),
        (("lookahead:window_size=16",), "16 columns at level 5 has 64 nodes, .* lower window_size or level"),
        (("draft=/no/such/folder",), "draft model: there is no folder '/no/such/folder'"),
        ((DRAFT + ":depth=0",), "must be at least 1"),
        ((DRAFT + ":beam=40",), r"beam \* \(depth - 1\) under 64"),
        ((DRAFT + ":tau=0",), "tau must be positive"),
        ((DRAFT + ":tau=nan",), "tau must be positive"),
    ],
)
def test_settings_that_cannot_work(speculate: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(speculate)


def test_every_drafter_has_its_own_bit() -> None:
    engine, watched = build(examples())
    assert engine.info.drafters == tuple(EXAMPLES)
    assert torch.tensor([1 << drafter._bit for drafter in watched]).unique().numel() == len(EXAMPLES)
