"""Early exit: the first layers as a model, and as a drafter that writes where the target will write."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from torch import Tensor

from decoding.drafters.base import ChoosingDrafter
from decoding.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions, load_early_exit
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sequence import Sequence
from models.batch import PAGE_SIZE
from models.decoder import Decoder
from models.early_exit import ExitModel
from models.target import CausalModel
from tests.doubles import GarbageDrafter
from tests.engines import ALL_NODES, BuildDrafter, Outcome, make_engine, run, tiny_decoder, whole
from tests.paged import PagedRun

LAYERS = 3


@cache
def model(dtype: torch.dtype = torch.float64) -> Decoder:
    return tiny_decoder(dtype, layers=LAYERS)


def exiting(exit_layer: int, depth: int = 4, **options: object) -> BuildDrafter:
    """A drafter with a given exit; by default a chain of ``depth``."""
    chosen: dict[str, object] = {"top_k": 1, "beam": 1, "min_confidence": 0.0, **options}
    made = EarlyExitOptions(depth=depth, exit_layer=exit_layer, **chosen)  # type: ignore[arg-type]
    return lambda context: EarlyExitDrafter(made, context, ExitModel(model(), exit_layer))


def engine_with(exit_layer: int, depth: int = 4, **settings: object) -> Engine:
    drafters = {"early-exit": exiting(exit_layer, depth)}
    return make_engine(model(), drafters, **{"max_nodes": depth, "max_depth": depth, "plan": ALL_NODES, **settings})


def request(
    name: str, prompt_len: int, temperature: float = 0.0, max_tokens: int = 40, **fields: object
) -> GenerateRequest:
    params = SamplingParams(max_tokens, temperature, seed=prompt_len, ignore_eos=True)
    prompt = tuple((5 * i * i + prompt_len) % 48 for i in range(prompt_len))
    return GenerateRequest(name, prompt, params, **fields)  # type: ignore[arg-type]


def plain(requests: list[GenerateRequest]) -> dict[str, list[int]]:
    outcomes = run(make_engine(model(), prefix_caching=False), requests)
    return {name: outcome.tokens for (name, _), outcome in outcomes.items()}


def assert_all_accepted(outcome: Outcome) -> None:
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.drafted == stats.accepted > 0


# the first layers as a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, LAYERS])
def test_an_exit_is_the_final_norm_of_what_leaves_its_last_layer(dtype: torch.dtype, layers: int) -> None:
    target = model(dtype)
    runs = [PagedRun(each, rows=2) for each in (target, ExitModel(target, layers))]
    batch = runs[0].batch({0: list(range(20)), 1: [7, 8, 9]}, {1: [-1, 0, 0]})
    taps = (layers,) if layers < LAYERS else ()
    out = runs[0].forward(batch, taps)
    expected = out.hidden if not taps else target._stack._ops.rms_norm(out.taps[layers], target.final_norm, 1e-6)
    hidden = runs[1].forward(batch).hidden
    torch.testing.assert_close(hidden, expected)
    for full, part in ((runs[0].cache.keys, runs[1].cache.keys), (runs[0].cache.values, runs[1].cache.values)):
        assert torch.equal(part[:layers], full[:layers])
        assert not part[layers:].any(), "K/V of layers that do not run"
        assert full[layers:].any() or layers == LAYERS


@pytest.mark.parametrize("layers", [0, -1, LAYERS + 1])
def test_there_is_no_exit_elsewhere(layers: int) -> None:
    with pytest.raises(ValueError, match=rf"no exit after layer {layers}: the model has layers 1 .. {LAYERS}"):
        ExitModel(model(), layers)


# an exit after the last layer is the target: it guesses every token --------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_the_last_exit_guesses_everything(temperature: float, depth: int) -> None:
    engine = engine_with(LAYERS, depth)
    for prompt_len in (1, 16, 33, 37):
        for _ in range(2):  # the second time, the prompt's pages are found
            outcome = run(engine, [request("r", prompt_len, temperature)])["r", 0]
            sizes = [len(event.token_ids) for event in outcome.events]
            # in the step of a prompt's end its K/V is not there to draft from
            begins = prompt_len - outcome.events[0].cached_tokens > 1
            assert sizes[0] == (1 if begins else depth + 1)
            assert set(sizes[1:-1]) <= {depth + 1}
            assert_all_accepted(outcome)
        assert outcome.events[0].cached_tokens == (prompt_len - 1) // PAGE_SIZE * PAGE_SIZE


def test_a_tree_holds_the_right_path() -> None:
    drafters = {"early-exit": exiting(LAYERS, 4, top_k=3, beam=3)}
    engine = make_engine(model(), drafters, max_nodes=63, max_depth=4, plan=ALL_NODES)
    for prompt_len in (5, 15, 30):
        outcome = run(engine, [request("r", prompt_len, 0.9)])["r", 0]
        assert outcome.last.speculation is not None
        # a path may leave the beam where others are more probable, but not often
        assert len(outcome.tokens) / outcome.last.speculation.steps > 0.8 * 4


def test_in_a_batch_with_chunked_prompts_and_preemption() -> None:
    requests = [request(f"r{number}", 9 * number + 2, 0.9 * (number % 2)) for number in range(5)]
    chunked = engine_with(LAYERS, 3, max_num_batched_tokens=23)
    tight = engine_with(LAYERS, 3, num_pages=8)
    for engine in (chunked, tight):
        for outcome in run(engine, requests).values():
            assert_all_accepted(outcome)
    assert tight.stats().preemptions > 0


# the target's K/V -----------------------------------------------------------------------------------------------------


def slots_of(sequence: Sequence, count: int) -> Tensor:
    logical = torch.arange(count)
    return torch.tensor(sequence.pages)[logical // PAGE_SIZE] * PAGE_SIZE + logical % PAGE_SIZE


@pytest.mark.parametrize("exit_layer", [1, 2, LAYERS])
def test_k_v_of_committed_tokens_is_the_targets(exit_layer: int) -> None:
    """After every step, over page boundaries, beside drafts that are nearly all refused or all accepted."""
    drafters = {"early-exit": exiting(exit_layer, 5, top_k=3, beam=2), "other": GarbageDrafter}
    engine = make_engine(model(), drafters, max_nodes=20, max_depth=5, plan=ALL_NODES)
    engine.submit(request("r", 13, 0.9, max_tokens=50))
    [sequence] = engine._sequences.values()
    kv, committed = engine._stepper.cache.kv, 0
    while engine.has_work:
        engine.step()
        if not sequence.pages:
            break
        committed = sequence.cached
        reference = PagedRun(model())
        reference.extend([sequence.tokens[:committed].tolist()])
        there = torch.tensor(reference.pages[0])[torch.arange(committed) // PAGE_SIZE] * PAGE_SIZE
        there += torch.arange(committed) % PAGE_SIZE
        ours = slots_of(sequence, committed)
        torch.testing.assert_close(kv.keys[:, ours], reference.cache.keys[:, there], rtol=0, atol=1e-9)
        torch.testing.assert_close(kv.values[:, ours], reference.cache.values[:, there], rtol=0, atol=1e-9)
    assert committed > 3 * PAGE_SIZE


def test_pages_that_others_share_are_not_written() -> None:
    """Requests with one beginning draft at the same time, from its last page on."""
    engine = engine_with(1, 6)
    first = request("first", 48)
    run(engine, [first])
    cache = engine._stepper.cache
    shared = sorted(cache.prefixes._key_of)
    assert len(shared) >= 3
    slots = (torch.tensor(shared)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    before = cache.kv.keys[:, slots].clone(), cache.kv.values[:, slots].clone()
    params = SamplingParams(40, 0.9, ignore_eos=True)
    others = [
        GenerateRequest(
            f"r{n}", (*first.prompt_ids[: 48 - 8 * (n % 2)], 3 + n), SamplingParams(**{**vars(params), "seed": n})
        )
        for n in range(4)
    ]
    outcomes = run(engine, others)
    truth = plain(others)
    for asked in others:
        outcome = outcomes[asked.request_id, 0]
        assert outcome.events[0].cached_tokens >= 32
        assert outcome.last.speculation is not None
        assert outcome.last.speculation.drafted > 0
        assert outcome.tokens == truth[asked.request_id]
    assert torch.equal(cache.kv.keys[:, slots], before[0])
    assert torch.equal(cache.kv.values[:, slots], before[1])
    assert whole(engine)


@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_poor_exit_changes_no_text(exit_layer: int, temperature: float) -> None:
    requests = [request(f"r{n}", 7 * n + 1, temperature) for n in range(6)]
    requests.append(request("without", 20, temperature, speculation=SpeculationParams(enabled=False)))
    engine = engine_with(exit_layer, 5, num_pages=40, max_num_batched_tokens=50)
    outcomes = run(engine, requests)
    assert {name: outcome.tokens for (name, _), outcome in outcomes.items()} == plain(requests)
    assert engine.stats().by_drafter["early-exit"].drafted > 0


# loading -----------------------------------------------------------------------------------------------------------


def loaded(target: CausalModel, options: EarlyExitOptions) -> Engine:
    drafters: dict[str, BuildDrafter] = {"early-exit": lambda context: load_early_exit(options, context)}
    return make_engine(target, drafters)  # type: ignore[arg-type]


def test_the_exit_is_measured_once_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="saccade.engine"):
        engine = loaded(model(), EarlyExitOptions())
    lines = [record.getMessage() for record in caplog.records if "early-exit" in record.getMessage()]
    assert "drafts with the first" in lines[0]
    [drafter] = engine._stepper.drafters.members
    assert isinstance(drafter, EarlyExitDrafter)
    assert isinstance(drafter, ChoosingDrafter), "reports show what it chose"
    assert "<- chosen" in drafter.choice
    assert run(engine, [request("r", 9)])["r", 0].tokens == plain([request("r", 9)])["r"]


class Whole:
    """A target that knows no exits."""

    def __init__(self, inner: Decoder) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "max_model_len", "kv_spec", "dtype", "device"):
            setattr(self, name, getattr(inner, name))
        self.forward, self.embed, self.logits = inner.forward, inner.embed, inner.logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EarlyExitOptions(exit_layer=LAYERS + 1), rf"no exit after layer {LAYERS + 1}.*Give exit_layer another value"),
        (EarlyExitOptions(exit_layer=-1), "no exit after layer -1"),
        (EarlyExitOptions(depth=0), "must be at least 1"),
        (EarlyExitOptions(beam=30, depth=6), r"beam \* \(depth - 1\) under 64"),
        (EarlyExitOptions(path="/no/such/folder"), "early-exit: there is no folder"),
    ],
)
def test_settings_that_cannot_work(options: EarlyExitOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(model(), options)


def test_targets_without_exits_are_refused() -> None:
    with pytest.raises(ConfigError, match="a Whole cannot stop after some of its layers"):
        loaded(Whole(model()), EarlyExitOptions())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a model of one layer has no earlier exit"):
        loaded(tiny_decoder(torch.float64, layers=1), EarlyExitOptions())
