"""The Token Recycling drafter in an engine: what it learns from, for whom, when, and what that costs."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from decoding.assemble import LoadedModel, build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.base import DrafterContext
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.drafters.recycling import RecyclingDrafter, RecyclingOptions
from decoding.drafters.successors import grow_anywhere, grow_fused, learn_anywhere, learn_fused
from decoding.drafters.team import DrafterTeam
from decoding.engine import Engine
from decoding.plan import Plan, Quota, RowQuota
from decoding.planner import Limits
from decoding.probe import Probe
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sampling import Sampling
from decoding.sampling_ops import CpuSamplingOps
from decoding.step_ops import StepOps, load_step_ops
from models.target import ForwardOutput, Top
from models.tree import Trees
from tests.engines import ALL_NODES, ROOT, VOCAB, device_ops, make_engine, run, tiny_decoder
from tests.waits import watch

CPU = torch.device("cpu")
GREEDY = SamplingParams(40, 0.0, ignore_eos=True)
PROMPT = tuple(range(6, 18))

target = cache(lambda: tiny_decoder(torch.float64))


class Noting(RecyclingDrafter):
    """Notes how many tokens it knew each time it proposed."""

    def __init__(self, options: RecyclingOptions, context: DrafterContext) -> None:
        super().__init__(options, context)
        self.known: list[int] = []

    def tokens(self, salt: str = "") -> int:
        return self._matrices.of([salt])[0][0].used

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = super().propose(plan, quota, sampling)
        self.known.append(self.tokens())
        return trees


class CountingOps(CpuSamplingOps):
    """Counts the rows whose likeliest tokens are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def top(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        return super().top(x, k)


def counting_ops() -> tuple[StepOps, CountingOps]:
    ops = CountingOps()
    return replace(load_step_ops(CPU), sampling=ops), ops


def recycling(
    seen: list[Noting] | None = None, device: torch.device = CPU, **options: int
) -> Callable[[DrafterContext], Noting]:
    def build(context: DrafterContext) -> Noting:
        drafter = Noting(RecyclingOptions(**options), replace(context, device=device))
        if seen is not None:
            seen.append(drafter)
        return drafter

    return build


def plain_text(request: GenerateRequest) -> list[int]:
    return run(make_engine(target()), [request])[request.request_id, 0].tokens


# when the likeliest tokens are computed ------------------------------------------------------------------------------


def test_nobody_who_wants_them_no_likeliest_tokens() -> None:
    ops, counting = counting_ops()
    engine = make_engine(target(), {"ngram": lambda context: NgramDrafter(NgramOptions(), context)}, ops=ops)
    run(engine, [GenerateRequest("r", PROMPT, GREEDY)])
    assert counting.rows == []


@pytest.mark.parametrize(
    "wish",
    [SpeculationParams(enabled=False), SpeculationParams(drafters=()), SpeculationParams(max_nodes=0)],
    ids=["disabled", "others", "plain"],
)
def test_a_drafter_that_is_not_asked_costs_nothing(wish: SpeculationParams) -> None:
    ops, counting = counting_ops()
    drafters: list[Noting] = []
    engine = make_engine(target(), {"recycling": recycling(drafters)}, ops=ops)
    run(engine, [GenerateRequest("r", PROMPT, GREEDY, wish)])
    assert counting.rows == []
    assert drafters[0].tokens() == 0


def test_they_are_computed_once_a_step_for_every_node() -> None:
    ops, counting = counting_ops()
    # two that want them, one with more than the other
    engine = make_engine(target(), {"a": recycling(top_k=3), "b": recycling(top_k=8)}, ops=ops, plan=ALL_NODES)
    run(engine, [GenerateRequest("r", PROMPT, GREEDY)])
    stats = engine.stats()
    assert len(counting.rows) <= stats.steps
    # the last steps draft nothing, as no text is left for it
    assert sum(counting.rows) >= stats.drafted
    assert max(counting.rows) == 25, "the root and 24 nodes"


def test_the_time_they_take_is_shared_by_those_who_asked() -> None:
    class SlowSampling:
        def top(self, logits: Tensor, k: int) -> Top:
            time.sleep(0.02)
            return Top(*reversed(logits.topk(k)))

    context = DrafterContext(
        "", 0, target(), cast(Any, None), torch.float64, CPU, "auto", max_model_len=64, max_step_tokens=64
    )
    members = [
        RecyclingDrafter(RecyclingOptions(), replace(context, name=name, bit=bit)) for bit, name in enumerate("abc")
    ]
    team = DrafterTeam([*members])
    limits = Quota((RowQuota(4, 4, frozenset({"a"})), RowQuota(4, 4, frozenset({"a", "c"}))))
    out = ForwardOutput(torch.zeros(2, 8))
    ranked = team.with_top(out, torch.randn(2, 20), limits, cast(Any, SlowSampling()))
    assert ranked.top is not None
    assert ranked.top.ids.shape == (2, 8)
    assert team.taken["a"] == team.taken["c"] >= 0.01
    assert team.taken["b"] == 0.0
    assert team.with_top(out, torch.randn(2, 20), Quota((RowQuota(),)), cast(Any, SlowSampling())) is out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [40, 3000, 40_000])
def test_the_kernel_takes_the_likeliest_of_the_tokenizers_ids(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(7, vocab + 9, generator=generator, dtype=dtype)
    logits[:, vocab:] = 100.0  # ids of padding
    values, ids = CpuSamplingOps().top(logits[:, :vocab], 8)
    expected = logits[:, :vocab].topk(8, dim=1)
    assert torch.equal(ids, expected.indices)
    assert torch.equal(values, expected.values)
    logits[:, :] = 1.0
    assert CpuSamplingOps().top(logits, 3)[1].tolist() == [[0, 1, 2]] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1023, 2048, 5000, 16_384, 20_000])
def test_of_equal_values_the_lowest_ids_come_first(vocab: int, dtype: torch.dtype) -> None:
    """However many values are the same, or none at all."""
    generator = torch.Generator().manual_seed(vocab)
    kinds = [torch.randn(vocab, generator=generator, dtype=dtype).mul(scale).round() for scale in (0.1, 1, 30)]
    rows = [*kinds, kinds[1].clone(), torch.full_like(kinds[0], -torch.inf), torch.arange(vocab, dtype=dtype)]
    rows[3][torch.randperm(vocab, generator=generator)[: vocab - 5]] = -torch.inf
    rows[2][::3] = torch.nan
    logits = torch.stack([*rows, rows[-1].flip(0)])
    known = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
    for k in (1, 2, 8, 20, 64):
        values, ids = CpuSamplingOps().top(logits, k)
        expected = known.sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids, expected.indices[:, :k])
        assert torch.equal(values, expected.values[:, :k])


# what is learned, and for whom ---------------------------------------------------------------------------------------


def test_matrices_are_separated_by_salt() -> None:
    drafters: list[Noting] = []
    engine = make_engine(target(), {"recycling": recycling(drafters)}, plan=ALL_NODES)
    [drafter] = drafters
    first = GenerateRequest("first", PROMPT, GREEDY, cache_salt="a")
    run(engine, [first])
    assert drafter.tokens("a") > 5
    assert drafter.tokens("b") == drafter.tokens("") == 0

    def first_steps(name: str, salt: str) -> int:
        """Tokens drafted in two steps: that of the prompt and the next."""
        before = engine.stats().drafted
        engine.submit(replace(first, request_id=name, cache_salt=salt))
        for _ in range(2):
            engine.step()
        engine.cancel(name)
        return engine.stats().drafted - before

    assert first_steps("second", "b") < first_steps("third", "a") == 2 * 24


def test_a_warm_matrix_drafts_better_than_a_cold_one() -> None:
    engine = make_engine(target(), {"recycling": recycling()}, plan=ALL_NODES)
    accepted = [0]
    for turn in range(3):
        outcome = run(engine, [GenerateRequest(f"r{turn}", PROMPT, GREEDY)])[f"r{turn}", 0]
        assert outcome.tokens == plain_text(GenerateRequest("plain", PROMPT, GREEDY))
        accepted.append(engine.stats().accepted)
    gained = [after - before for before, after in itertools.pairwise(accepted)]
    assert 0 < gained[0] < gained[2]


def test_without_a_compiler_it_drafts_the_same() -> None:
    accepted = []
    for learn, grow in ((learn_fused, grow_fused), (learn_anywhere, grow_anywhere)):
        drafters: list[Noting] = []
        engine = make_engine(target(), {"recycling": recycling(drafters)}, plan="fixed:min_probability=0.05")
        drafters[0]._learn, drafters[0]._grow = learn, grow
        run(engine, [GenerateRequest("r", PROMPT, GREEDY)])
        accepted.append((engine.stats().drafted, engine.stats().accepted))
    assert accepted[0] == accepted[1]
    assert accepted[0][1] > 0


def test_options_limit_the_tree() -> None:
    engine = make_engine(target(), {"recycling": recycling(top_k=2, nodes=5)}, plan=ALL_NODES)
    run(engine, [GenerateRequest("r", PROMPT, GREEDY)])
    stats = engine.stats()
    assert 0 < stats.drafted <= 5 * stats.steps


def test_nothing_stays_of_made_up_texts() -> None:
    """Those of a probe: neither successors nor what was counted of them; and only those."""
    drafters: list[Noting] = []
    engine = make_engine(target(), {"recycling": recycling(drafters)}, plan=ALL_NODES)
    [drafter] = drafters
    run(engine, [GenerateRequest("r", PROMPT, GREEDY)])
    drafter._settle()
    known, counts = drafter.tokens(), drafter._counts[[0, 1]]
    stepper = engine._stepper
    limits = Limits(stepper.cache, stepper.drafters.members, 24, 8)
    with torch.inference_mode():
        assert Probe(stepper, limits, VOCAB, 8).measure() is not None
    assert drafter.known[-1] == known, "it was asked, and learned from them meanwhile"
    assert (drafter.tokens(), len(drafter._matrices)) == (known, 1)
    assert torch.equal(drafter._counts[[0, 1]], counts)
    assert drafter._heard is None
    assert not drafter._made_up


# on a device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_device_s_steps_are_learned_one_step_later_and_the_text_stays(temperature: float) -> None:
    request = GenerateRequest("r", PROMPT, replace(GREEDY, temperature=temperature, seed=3))
    known: dict[str, list[int]] = {}
    for name, device in (("here", CPU), ("there", torch.device("cuda"))):
        drafters: list[Noting] = []
        settings = {"plan": ALL_NODES, "ops": device_ops()}
        engine = make_engine(target(), {"recycling": recycling(drafters, device)}, **settings)  # type: ignore[arg-type]
        tokens: list[int] = []
        engine.submit(request)
        while engine.has_work:
            with watch() as waits:
                tokens += [token for event in engine.step() for token in event.token_ids]
            assert not waits.others
        assert tokens == plain_text(request)
        assert engine.stats().accepted > 0
        known[name] = drafters[0].known
    assert known["here"][:2] == [0, 1], "the prompt's last token, by the second step"
    assert known["there"][:3] == [0, 0, 1]


def test_padding_of_a_device_s_trees_teaches_nothing_wrong() -> None:
    """It carries the root's token without being the root; what the root's token is followed by is the root's to say."""
    request, learned = GenerateRequest("r", PROMPT, GREEDY), []
    for ops in (load_step_ops(CPU), device_ops()):
        drafters: list[Noting] = []
        engine = make_engine(target(), {"recycling": recycling(drafters)}, ops=ops, plan="fixed:min_probability=0.1")
        run(engine, [request])
        [matrix], _ = drafters[0]._matrices.of([""])
        known = matrix.index > 0
        learned.append((known, matrix.rows[matrix.index[known].long() - 1]))
    assert torch.equal(learned[0][0], learned[1][0])
    assert torch.equal(learned[0][1], learned[1][1])


# on the demo model ---------------------------------------------------------------------------------------------------


@cache
def demo() -> LoadedModel:
    return load_target(EngineConfig(f"{ROOT}/demo/target", dtype="float32"))


def test_it_drafts_well_for_texts_like_those_before() -> None:
    """Other prompts of the same kind, after some have been continued: more than a token a step is accepted."""
    loaded = demo()
    config = EngineConfig(f"{ROOT}/demo/target", dtype="float32", speculate=("recycling",), plan="fixed")
    engine = Engine(config, loaded, build_stepper(config, loaded, build_drafters(config, loaded)))
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:12]
    prompts = [tuple(loaded.tokenizer.encode(json.loads(line)["prompt"]))[:120] for line in lines]
    params = SamplingParams(64, 0.0, ignore_eos=True)
    run(engine, [GenerateRequest(f"warm {n}", prompt, params) for n, prompt in enumerate(prompts[:8])])
    before = engine.stats()
    for number, prompt in enumerate(prompts[8:]):
        run(engine, [GenerateRequest(f"r{number}", prompt, params)])
    stats = engine.stats()
    assert (stats.accepted - before.accepted) / (stats.steps - before.steps) > 0.5
