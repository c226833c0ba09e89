"""Lookahead decoding: the window by hand, its pool, what is drawn for it, and what it brings."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from decoding.acceptance import Acceptance
from decoding.assemble import LoadedModel, build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.base import DrafterContext
from decoding.drafters.lookahead import NOBODY, LookaheadDrafter, LookaheadOptions
from decoding.drafters.lookahead_states import PlainStates, branches_of, columns_of
from decoding.drafters.lookahead_window import Window
from decoding.drafters.ngram_pool import MAX_KEYS, NgramPool
from decoding.engine import Engine
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sampling import Sampling
from models.decoder import Decoder
from models.graphs import EagerCapture
from models.tree import GUESSED, PINS, Trees, ancestor_masks
from tests.engines import ROOT, VOCAB, device_ops, make_engine, run, tiny_decoder
from tests.waits import watch


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def plain() -> Engine:
    return make_engine(target(), prefix_caching=False)


# the pool -------------------------------------------------------------------------------------------------------------


def test_the_pool_keeps_the_most_recent_ngrams_of_each_token() -> None:
    pool = NgramPool(np.array([1, 2, 3, 1, 4, 5, 1, 2, 3, 9, 1]), level=3, size=2)
    assert pool.find(1) == [(2, 3), (4, 5)]  # the text's own, the latest first; the last 1 has nothing behind it
    pool.add(1, (6, 7))
    assert pool.find(1) == [(6, 7), (2, 3)]
    pool.add(1, (2, 3))
    pool.add(1, (8, 8))
    assert pool.find(1) == [(8, 8), (2, 3)]
    assert pool.find(7) == []
    assert NgramPool(np.array([1]), level=3, size=2).find(1) == []


def test_the_pool_is_bounded() -> None:
    pool = NgramPool(np.arange(50), level=4, size=3)
    for number in range(20 * MAX_KEYS):
        pool.add(number % (2 * MAX_KEYS), (number, 1, 2))
    assert len(pool) <= 3 * MAX_KEYS
    assert pool.find(2 * MAX_KEYS - 1)[0] == (20 * MAX_KEYS - 1, 1, 2)


# the window -----------------------------------------------------------------------------------------------------------


def window_of(rows: list[list[int]]) -> Window:
    window = Window(len(rows) + 1, len(rows[0]), np.array([77]), seed=0)
    assert window.rows == [[77] * len(rows[0])] * len(rows)
    window.rows = rows
    return window


def as_tree(window: Window) -> tuple[list[tuple[int, int]], list[int]]:
    """(parent, token) of each node, and the columns of the last row."""
    nodes: list[tuple[int, int]] = []

    def node_of(parent: int, token: int) -> int:
        if (parent, token) not in nodes:
            nodes.append((parent, token))
        return 1 + nodes.index((parent, token))

    last = window.place(node_of)
    assert last is not None
    return nodes, last


def test_the_window_is_a_tree() -> None:
    window = window_of([[1, 2], [3, 4], [5, 6]])
    nodes, last = as_tree(window)
    #   root - 1 - 2 - 4 - 6        row 0 is a chain, each column hangs on its token
    #           \- 3 - 5
    assert nodes == [(0, 1), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6)]
    assert last == [5, 6]
    assert (window.nodes, window.depth) == (6, 4)


def test_equal_tokens_in_equal_places_are_one_node() -> None:
    nodes, last = as_tree(window_of([[1, 2], [2, 3], [3, 4]]))  # one trajectory that has converged
    assert nodes == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert last == [3, 4]


def test_rows_move_up_and_columns_become_ngrams() -> None:
    window, pool = Window(4, 2, np.array([77]), seed=0), NgramPool(np.array([0]), 4, 5)
    drawn = [[1, 2], [3, 4], [5, 6], [7, 8]]
    for row in drawn[:2]:
        window.advance(row, pool)
    assert len(pool) == 0, "random tokens are in them"
    window.advance(drawn[2], pool)
    assert pool.find(77) == [(2, 4, 6), (1, 3, 5)], "the first token of an n-gram may be any"
    window.advance(drawn[3], pool)
    assert pool.find(1) == [(3, 5, 7)]
    assert pool.find(2) == [(4, 6, 8)]
    assert window.rows == drawn[1:]


def test_columns_move_with_the_text() -> None:
    window, pool = window_of([[1, 2, 3], [4, 5, 6]]), NgramPool(np.array([0]), 3, 5)
    for _ in range(2):
        window.advance([7, 8, 9], pool)
    window.slide(1)
    assert window.rows == [[8, 9, 77], [8, 9, 77]]
    before = len(pool)
    window.advance([1, 2, 3], pool)
    assert len(pool) == before + 2, "not that of the new column"
    window.slide(9)
    assert window.rows == [[77] * 3] * 2


def test_the_window_is_found_in_a_tree_of_others() -> None:
    """Among nodes of others, and a device's padding, which looks like a child of the root."""
    window = window_of([[1, 2], [3, 4]])
    tokens = torch.tensor([[9, 5, 1, 3, 7, 2, 4, 9]])
    parents = torch.tensor([[-1, 0, 0, 2, 3, 2, 5, -1]])
    masks = ancestor_masks(parents)[0].tolist()
    assert columns_of(window, branches_of(tokens[0].tolist(), masks)) == [3, 6]
    parents[0, 6] = 3  # the last node is elsewhere
    assert columns_of(window, branches_of(tokens[0].tolist(), ancestor_masks(parents)[0].tolist())) is None


# what is drawn --------------------------------------------------------------------------------------------------------


class Spied(LookaheadDrafter):
    """Remembers the window that it proposed."""

    rows: list[list[int]] | None = None
    text: tuple[int, ...] = ()

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = super().propose(plan, quota, sampling)
        self.rows = None
        for row, number in zip(plan.deciding, self._proposed, strict=False):
            if number != NOBODY:
                self.rows, self.text = self._states.window(number).tolist(), tuple(row.sequence.tokens.tolist())
        if self.rows is not None:
            assert trees is not None
            self.check(trees)
        return trees

    def check(self, trees: Trees) -> None:
        source = trees.source[0, 1:]
        assert int((source >> PINS != 0).sum()) <= 3 * 4
        assert bool(((source & GUESSED) | (source >> PINS) != 0).all())


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("rule", ["exact", "typical"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_window_goes_on_with_what_the_target_draws_after_it(temperature: float, rule: str, as_on_cuda: bool) -> None:
    """Under the request's own noise of that place, whatever its acceptance rule."""
    spies: list[Spied] = []

    def build(context: DrafterContext) -> Spied:
        spies.append(Spied(LookaheadOptions(4, 4, 3), context))
        return spies[-1]

    setting = {"ops": device_ops(), "capture": EagerCapture()} if as_on_cuda else {}
    engine = make_engine(target(), {"lookahead": build}, max_nodes=30, max_depth=8, **setting)  # type: ignore[arg-type]
    params = SamplingParams(40, temperature, seed=3, ignore_eos=True)
    wish = SpeculationParams(acceptance=Acceptance(rule))
    engine.submit(GenerateRequest("r", (3, 1, 4, 1, 5), params, wish))
    checked = 0
    while engine.has_work and checked < 6:
        engine.step()
        spy = spies[0]
        if spy.rows is None or spy._draws is None or ("r", 0) not in spy._numbers:
            continue
        spy._learn()
        window = spy._states.window(spy._numbers["r", 0]).tolist()
        assert window[:-1] == spy.rows[1:]
        for column, drawn in enumerate(window[-1]):
            path = (*spy.rows[0][: column + 1], *(row[column] for row in spy.rows[1:]))
            request = GenerateRequest("p", (*spy.text, *path), replace(params, max_tokens=1))
            assert run(plain(), [request])["p", 0].tokens == [drawn]
        checked += 1
    assert checked == 6


def test_a_step_on_a_device_waits_for_its_results_alone() -> None:
    """The draws are read a step later: a second read, of a copy that was begun before the last step's results came."""
    engine = make_engine(
        target(),
        {"lookahead": lambda context: LookaheadDrafter(LookaheadOptions(4, 3, 3), context)},
        ops=device_ops(),
        capture=EagerCapture(),
        max_nodes=30,
    )
    for number in range(3):
        params = SamplingParams(30, 0.9, seed=number, ignore_eos=True)
        engine.submit(GenerateRequest(f"r{number}", tuple(range(1, 20 + number)), params))
    reads = []
    while engine.has_work and len(reads) < 12:
        with watch() as waits:
            engine.step()
        assert not waits.others
        reads.append(waits.reads)
    assert set(reads[3:]) == {2}


# limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "depth", "width"),
    [(63, 10, 7), (63, 8, 5), (24, 8, 3), (8, 8, 1), (7, 8, 0), (63, 4, 1), (63, 3, 0)],
)
def test_a_window_is_as_wide_as_the_row_has_room_for(nodes: int, depth: int, width: int) -> None:
    drafters: list[LookaheadDrafter] = []

    def build(context: DrafterContext) -> LookaheadDrafter:
        drafters.append(LookaheadDrafter(LookaheadOptions(), context))
        return drafters[-1]

    engine = make_engine(target(), {"lookahead": build}, max_nodes=nodes, max_depth=depth)
    engine.submit(GenerateRequest("r", (3, 1, 4, 1, 5), SamplingParams(60, 0.0, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    [drafter] = drafters
    assert drafter._states.window(drafter._numbers["r", 0]).shape[1] == width
    engine.cancel("r")
    assert not drafter._numbers
    assert drafter._states.usage() == [0, 0]


def test_the_log_says_once_that_windows_are_narrow(caplog: pytest.LogCaptureFixture) -> None:
    """Not of texts that end before a wider one would have helped."""
    options = {"lookahead": partial(LookaheadDrafter, LookaheadOptions())}
    engine = make_engine(target(), options, max_nodes=24, max_depth=8)  # type: ignore[arg-type]
    with caplog.at_level("INFO", logger="saccade.engine"):
        run(engine, [GenerateRequest("short", (3, 1, 4), SamplingParams(8, 0.0, ignore_eos=True))])
        assert "windows of" not in caplog.text
        for name in ("a", "b"):
            run(engine, [GenerateRequest(name, (3, 1, 4), SamplingParams(40, 0.0, ignore_eos=True))])
    assert caplog.text.count("windows of 3 columns in place of 7") == 1
    assert "--max-nodes 56 --max-depth 10" in caplog.text


# without a compiler ---------------------------------------------------------------------------------------------------


class Plain(LookaheadDrafter):
    """As where there is no compiler."""

    def __init__(self, options: LookaheadOptions, context: DrafterContext) -> None:
        super().__init__(options, context)
        self._states = PlainStates(self._rules)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_without_a_compiler_it_drafts_the_same(temperature: float) -> None:
    params = SamplingParams(60, temperature, seed=5, ignore_eos=True)
    requests = [GenerateRequest(f"r{number}", tuple(range(1, 9 + number)), params) for number in range(3)]
    drafted = []
    for plainly in (False, True):
        build = Plain if plainly else LookaheadDrafter
        options = LookaheadOptions(4, 3, 5)
        drafters = {"lookahead": partial(build, options)}
        engine = make_engine(target(), drafters, max_nodes=30, max_depth=8)  # type: ignore[arg-type]
        run(engine, requests)
        drafted.append((engine.stats().steps, engine.stats().drafted, engine.stats().accepted))
    assert drafted[0] == drafted[1]
    assert drafted[0][2] > 0


# what it brings -------------------------------------------------------------------------------------------------------


@cache
def demo() -> LoadedModel:
    return load_target(EngineConfig(f"{ROOT}/demo/target", dtype="float32"))


def test_it_needs_fewer_steps_than_plain_decoding() -> None:
    config = EngineConfig(
        f"{ROOT}/demo/target", dtype="float32", speculate=("lookahead",), plan="fixed:nodes=63,depth=8", num_pages=200
    )
    engine = Engine(config, demo(), build_stepper(config, demo(), build_drafters(config, demo())))
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:4]
    prompts = [tuple(demo().tokenizer.encode(json.loads(line)["prompt"]))[:200] for line in lines]
    params = SamplingParams(100, 0.0, ignore_eos=True)
    outcomes = run(engine, [GenerateRequest(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)])
    for outcome in outcomes.values():
        stats = outcome.last.speculation
        assert stats is not None
        assert stats.steps < 100 / 1.2
        assert 0 < stats.accepted <= stats.drafted
        assert stats.drafted <= 28 * stats.steps, "the window does not count"


def test_another_vocabulary_is_no_matter() -> None:
    """Tokens of the window are those of the text or drawn: below the target's vocabulary, whatever it is."""
    options = LookaheadOptions(3, 2, 2)
    engine = make_engine(target(), {"lookahead": lambda context: LookaheadDrafter(options, context)}, max_nodes=20)
    request = GenerateRequest("r", (VOCAB - 1,), SamplingParams(30, 1.5, seed=1, ignore_eos=True))
    assert run(engine, [request])["r", 0].tokens == run(plain(), [request])["r", 0].tokens
