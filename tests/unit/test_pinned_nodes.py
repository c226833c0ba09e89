"""Pinned nodes: bought whole or not at all, beside what is worth its price, and counted when they prove right."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.costs import EDGES, CostModel, CostTable, DraftPrice
from decoding.drafters.base import Needs
from decoding.engine import Engine
from decoding.guessers import TRY, Guessers
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.proposal_ops import TorchProposalOps
from decoding.pulse import LIGHT, PLAIN, Beat
from decoding.request import GenerateRequest, SamplingParams
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from models.decoder import Decoder
from models.tree import GUESSED, NO_PARENT, PINS, Trees, depths, is_node, merge
from models.tree_ops import DeviceTreeOps, TorchTreeOps, TreeOps, load_tree_ops
from tests.contract.test_tree_ops import CPU, EXACT, OTHERS, assert_same, random_trees, shapes, widths
from tests.doubles import OracleDrafter
from tests.engines import make_engine, run, tiny_decoder

DEFINITION = TorchTreeOps()
PINNED = 1 << PINS


def pin(trees: Trees, bit: int, share: float, generator: torch.Generator) -> None:
    """Pin some nodes, and their ancestors; some that nobody's guess hangs on are pinned only."""
    source, parents = trees.source, trees.parents.tolist()
    for row in range(trees.num_rows):
        needed: set[int] = set()  # nodes that are guessed, for a node below them is
        for column in range(trees.width - 1, 0, -1):
            parent = parents[row][column]
            if parent == NO_PARENT:
                continue
            if float(torch.rand((), generator=generator)) < share:
                source[row, column] |= 1 << (PINS + bit)
            is_pinned = int(source[row, column]) >> PINS != 0
            if is_pinned and column not in needed and float(torch.rand((), generator=generator)) < 0.6:
                source[row, column] &= ~GUESSED
            else:
                needed.add(parent)
            if is_pinned and parent > 0:
                source[row, parent] |= source[row, column] >> PINS << PINS


@st.composite
def proposals(draw: st.DrawFn) -> list[Trees]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, tokens = draw(st.integers(1, 4)), draw(st.sampled_from([2, 3, 10]))
    made = []
    for number in range(draw(st.integers(1, 3))):
        trees = random_trees(rows, draw(widths), tokens, draw(shapes), generator, source=2 * number)
        pin(trees, number, draw(st.sampled_from([0.0, 0.03, 0.4])), generator)
        made.append(trees)
    return made


def assert_whole_or_not_at_all(given_trees: list[Trees], chosen: Trees, max_nodes: list[int], depth: list[int]) -> None:
    merged = merge(given_trees)
    pinned = is_node(merged) & (merged.source >> PINS != 0)
    level = depths(merged.parents)
    kept = is_node(chosen) & (chosen.source >> PINS != 0)
    for row, (nodes, deepest) in enumerate(zip(max_nodes, depth, strict=True)):
        count = int(pinned[row].sum())
        if count <= nodes and not bool((pinned[row] & (level[row] > deepest)).any()):
            assert int(kept[row].sum()) == count
        else:
            assert not bool((kept[row] & (chosen.source[row] & GUESSED == 0)).any()), "nobody wants these by themselves"


@pytest.fixture(scope="module", params=OTHERS)
def ops(request: pytest.FixtureRequest) -> TreeOps:
    return load_tree_ops(CPU, request.param)


@given(proposals(), st.data())
@settings(max_examples=150, deadline=None)
def test_every_choice_is_the_definitions(ops: TreeOps, trees: list[Trees], data: st.DataObject) -> None:
    rows = trees[0].num_rows
    max_nodes = data.draw(st.lists(st.sampled_from([0, 1, 8, 24, 63]), min_size=rows, max_size=rows))
    max_depth = data.draw(st.lists(st.sampled_from([1, 3, 63]), min_size=rows, max_size=rows))
    floor = data.draw(st.sampled_from([0.0, 0.3]))
    base, slope, stair = (data.draw(st.sampled_from(each)) for each in ([0.1, 1.0], [0.0, 0.05, 3.0], [1, 8]))
    prices = base + slope * (torch.arange(sum(max_nodes) + 1, dtype=torch.float64) // stair)
    for price in (None, prices):
        chosen = ops.choose(trees, max_nodes, max_depth, floor, 0, price)
        assert_same(chosen, DEFINITION.choose(trees, max_nodes, max_depth, floor, 0, price))
        chosen.trees.validate()
        assert all(count <= 1 + most for count, most in zip(chosen.counts, max_nodes, strict=True))
        assert_whole_or_not_at_all(trees, chosen.trees, max_nodes, max_depth)
        padded = DeviceTreeOps().choose(trees, max_nodes, max_depth, floor, 0, price).trees
        width = chosen.trees.width
        assert torch.equal(padded.source[:, :width], chosen.trees.source)
        assert not padded.source[:, width:].any()


def a_window(confidence: list[float], source: list[int]) -> Trees:
    """1 - 2, 3 and 1 - 4: two nodes that are pinned, and two guesses."""
    return Trees(
        torch.tensor([[9, 1, 2, 3, 4]]),
        torch.tensor([[NO_PARENT, 0, 1, 0, 1]]),
        torch.tensor([[1.0, *confidence]]),
        torch.tensor([[0, *source]]),
    )


@pytest.mark.parametrize("name", EXACT)
def test_pinned_nodes_by_hand(name: str) -> None:
    choose = load_tree_ops(CPU, name).choose
    trees = a_window([0.25, 0.01, 0.5, 0.5], [PINNED | 1, PINNED, 1, 1])
    assert choose([trees], [4], [2], 0.1).trees.tokens.tolist() == [[9, 1, 2, 3, 4]]  # 2 is improbable, and pinned
    assert choose([trees], [3], [2], 0.1).trees.tokens.tolist() == [[9, 1, 2, 3]]
    assert choose([trees], [2], [2], 0.1).trees.tokens.tolist() == [[9, 1, 2]]
    assert choose([trees], [1], [2], 0.1).trees.tokens.tolist() == [[9, 3]]  # no room: the best guess
    assert choose([trees], [4], [1], 0.1).trees.tokens.tolist() == [[9, 1, 3]]  # too deep: 1 is a guess, too
    two = a_window([0.0, 0.0, 0.0, 0.9], [2, 2, 2, 2])
    both = choose([trees, two], [4], [2], 0.1).trees
    assert both.source.tolist() == [[0, PINNED | 3, PINNED | 2, 3, 3]]
    assert both.confidence.tolist() == [[1.0, 0.25, pytest.approx(0.01), 0.5, pytest.approx(0.9)]]


@pytest.mark.parametrize("name", EXACT)
def test_others_are_priced_beside_pinned_nodes(name: str) -> None:
    choose = load_tree_ops(CPU, name).choose
    trees = a_window([0.25, 0.01, 0.5, 0.5], [PINNED, PINNED, 1, 1])

    def counts(prices: list[float]) -> list[int]:
        return choose([trees], [4], [2], 0.0, 0, torch.tensor(prices, dtype=torch.float64)).counts

    assert counts([1.0, 9.0, 9.0, 9.0, 9.0]) == [5]  # a step with the window costs 9; more costs no more
    assert counts([1.0, 1.0, 1.0, 9.0, 9.0]) == [3]
    assert counts([1.0, 1.0, 1.0, 1.1, 9.0]) == [4]
    assert counts([1.0, 2.0, 4.0, 8.0, 16.0]) == [3]  # it is bought, though nothing is worth its price


# accounting -----------------------------------------------------------------------------------------------------------


class PinningOracle(OracleDrafter):
    """Proposes the text among wrong siblings, as nodes that it needs and does not take for right."""

    needs = Needs(host=True, pins=True)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = super().propose(plan, quota, sampling)
        return trees and replace(trees, source=trees.source << PINS)


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def truth() -> list[int]:
    params = SamplingParams(48, 0.9, seed=11, ignore_eos=True)
    return run(make_engine(target()), [GenerateRequest("r", (3, 1, 4, 1, 5), params)])["r", 0].tokens


def engine_of(**kinds: type[OracleDrafter]) -> Engine:
    texts = {("r", 0): [3, 1, 4, 1, 5, *truth()]}
    drafters = {name: lambda context, kind=kind: kind(context, texts) for name, kind in kinds.items()}
    return make_engine(target(), drafters, plan="fixed:nodes=8,depth=4,min_probability=1")


def test_pinned_nodes_count_as_drafted_where_they_are_accepted() -> None:
    request = GenerateRequest("r", (3, 1, 4, 1, 5), SamplingParams(48, 0.9, seed=11, ignore_eos=True))
    outcome = run(engine_of(pinning=PinningOracle), [request])["r", 0]
    assert outcome.tokens == truth()
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.accepted > 30, "improbable as they are, they are verified"
    assert stats.drafted == stats.accepted
    assert (stats.by_drafter["pinning"].drafted, stats.by_drafter["pinning"].accepted) == (stats.drafted,) * 2


class SureOracle(OracleDrafter):
    """Takes what it knows for certain: a fixed plan verifies it whatever the floor."""

    needs = Needs(host=True, fixed_tree=True)


def test_a_node_that_one_guesses_and_another_pins_counts_for_both_where_it_is_accepted() -> None:
    request = GenerateRequest("r", (3, 1, 4, 1, 5), SamplingParams(48, 0.9, seed=11, ignore_eos=True))
    stats = run(engine_of(guessing=SureOracle, pinning=PinningOracle), [request])["r", 0].last.speculation
    assert stats is not None
    guessing, pinning = stats.by_drafter["guessing"], stats.by_drafter["pinning"]
    assert stats.accepted == guessing.accepted == pinning.accepted == pinning.drafted
    assert stats.drafted == guessing.drafted > guessing.accepted


# the planner ----------------------------------------------------------------------------------------------------------


class Named:
    """As much of a drafter as the planner's ``Guessers`` see."""

    def __init__(self, name: str, *, pins: bool) -> None:
        self.name, self.needs = name, Needs(host=True, pins=pins)


def a_plan() -> Plan:
    sequence = Sequence(GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=9)), 0, 1)
    row = PlannedRow(sequence, 2, 1)
    return Plan((row,), (row,))


def guessers_of(node_price: float) -> Guessers:
    drafters = [Named("window", pins=True), Named("cheap", pins=False)]
    seconds = tuple(1e-3 + node_price * (edge - 1) for edge in EDGES)
    table = CostTable(EDGES, seconds, drafters={"window": DraftPrice(1e-5), "cheap": DraftPrice(1e-6)})
    return Guessers(cast(Any, drafters), CostModel(table), TorchProposalOps(), 4)


LIMITS = Quota((RowQuota(24, 4, frozenset({"window", "cheap"})),))


def steps(guessers: Guessers, count: int, trees: dict[int, Trees], saved: float = 0.0) -> list[bool]:
    """In which steps the window is asked for, if its guesses are ``trees``."""
    asked = []
    for _ in range(count):
        quota = guessers.ask_lightly(LIMITS, 1)
        asked.append("window" in quota.rows[0].drafters)
        assert "cheap" in quota.rows[0].drafters
        guesses = trees if asked[-1] else {bit: each for bit, each in trees.items() if bit != 0}
        guessers.pinned(guesses, quota)
        guessers.judge_pinning(a_plan(), guesses, guessers.asked(quota), 0.05)
        guessers.save(saved)
    return asked


def test_a_window_that_earns_nothing_rests_and_is_tried_for_some_steps() -> None:
    guessers = guessers_of(1e-4)
    improbable = a_window([0.01, 0.01, 0.01, 0.01], [PINNED, PINNED, PINNED, PINNED])
    begun = steps(guessers, 60, {0: improbable})
    assert begun[:TRY] == [True] * TRY
    assert not any(begun[TRY + 2 :])
    price = 1e-5 + 4 * 1e-4
    tried = steps(guessers, 400, {0: improbable}, saved=price / 10)  # a try of 16 steps costs 160 steps' savings
    assert tried.count(True) in range(2 * TRY, 3 * TRY + 4)
    first = tried.index(True)
    assert tried[first : first + TRY] == [True] * TRY


def test_a_window_that_earns_its_nodes_is_kept() -> None:
    good = a_window([0.01, 0.01, 0.9, 0.01], [PINNED, PINNED, 1, PINNED])
    assert all(steps(guessers_of(1e-4), 200, {0: good}))
    assert not all(steps(guessers_of(1e-3), 200, {0: good}))  # at ten times the price


def test_what_others_guess_too_is_not_the_windows_merit() -> None:
    good = a_window([0.01, 0.01, 0.9, 0.01], [PINNED, PINNED, 1, PINNED])
    assert not any(steps(guessers_of(1e-4), 200, {0: good, 1: replace(good, source=2 * is_node(good))})[100:])


def test_rows_without_room_buy_nothing() -> None:
    trees = a_window([0.1] * 4, [PINNED, PINNED, PINNED, 1])
    two = Trees(*(torch.cat([part, part]) for part in (trees.tokens, trees.parents, trees.confidence, trees.source)))
    guessers, names = guessers_of(1e-4), frozenset({"window"})
    assert guessers.pinned({0: two}, Quota((RowQuota(3, 4, names), RowQuota(2, 4, names)))) == [3, 0]


def test_a_gear_that_needs_patience_is_tried_for_longer() -> None:
    beat = Beat((PLAIN, LIGHT), least=20)

    def runs_of(gear: int, steps: int) -> list[int]:
        """Lengths of the gear's uninterrupted runs."""
        gears = []
        for _ in range(steps):
            gears.append(beat.next())
            beat.saw(gears[-1], 1, 1.0 if gears[-1] == PLAIN else 2.0)
        return [len(list(each)) for key, each in groupby(gears) if key == gear]

    assert runs_of(PLAIN, 40) == [6, 2], "plain steps need none, once they are known"
    runs_of(PLAIN, 1000)
    assert beat.current == PLAIN
    assert set(runs_of(LIGHT, 10_000)) == {20}
