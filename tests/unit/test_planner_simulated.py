"""The planner in a world of recorded proposals and measured costs: never slower, and quick to notice a change.

The recording is of the demo target with its drafters (benchmarks/record.py); the three price lists are those of an
8M-parameter model on two cores, of one of 0.3B there, and of a GPU on which steps cost the same up to 256 tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch

from benchmarks.record import Recording
from benchmarks.simulator import EndlessCache, World, rate
from decoding.auto_planner import AutoPlanner
from decoding.costs import EDGES, CostModel, CostTable, DraftPrice
from decoding.plan import Plan, Quota, RowQuota
from decoding.planner import Planner, StaticPlanner
from decoding.proposal_ops import load_proposal_ops
from models.tree_ops import load_tree_ops
from tests.engines import ROOT

CPU = torch.device("cpu")
Prices = dict[str, DraftPrice]


def prices_of(draft: DraftPrice, eagle3: DraftPrice, ngram: DraftPrice) -> Prices:
    return {"draft": draft, "eagle3": eagle3, "ngram": ngram}


TABLES = {
    "8M on a CPU": CostTable(
        EDGES,
        tuple(0.42e-3 * (1 + 0.045 * (t - 1)) for t in EDGES),
        row=1.5e-5,
        drafters=prices_of(
            DraftPrice(1.7e-4, 3e-5, 1.1e-4, 1.5e-5, 4e-8),
            DraftPrice(2.5e-4, 4e-5, 1.4e-4, 2e-5, 1e-7),
            DraftPrice(1e-5, 1e-6),
        ),
    ),
    "0.3B on a CPU": CostTable(
        EDGES,
        tuple(25e-3 * max(1 + 0.005 * (t - 1), 0.055 * t) for t in EDGES),
        row=3e-5,
        drafters=prices_of(
            DraftPrice(3e-3, 1e-4, 2.7e-3, 1e-4, 2e-6),
            DraftPrice(2.7e-3, 1e-4, 2.5e-3, 1e-4, 2e-6),
            DraftPrice(1e-5, 2e-6),
        ),
    ),
    "GPU": CostTable(
        EDGES,
        tuple(4e-3 * max(1 + 0.0005 * (t - 1), t / 256) for t in EDGES),
        row=1e-6,
        drafters=prices_of(
            DraftPrice(5e-4, 1e-6, 4.5e-4, 1e-6, 1e-7),
            DraftPrice(2.5e-4, 1e-6, 2.2e-4, 1e-6, 1e-7),
            DraftPrice(2e-5, 2e-6),
        ),
    ),
}
FIXED: dict[str, tuple[tuple[str, ...], int, int]] = {
    "plain": ((), 0, 1),
    "ngram-8": (("ngram",), 8, 8),
    "draft-4": (("draft",), 4, 4),
    "eagle3-16": (("eagle3",), 16, 5),
}


@cache
def recording() -> Recording:
    return Recording.load(ROOT / "benchmarks/recordings/demo.npz")


def auto(world: World, table: CostTable, **limits: int) -> AutoPlanner:
    return AutoPlanner(
        cast(Any, EndlessCache()),
        cast(Any, world.drafters()),
        load_tree_ops(CPU),
        load_proposal_ops(CPU),
        CostModel(table),
        **{"max_nodes": 24, "max_depth": 8, "max_step_tokens": 2048, **limits},
        device=CPU,
    )


class FixedPlanner(StaticPlanner):
    """Some of the drafters, in every step."""

    def __init__(self, world: World, names: tuple[str, ...], nodes: int, depth: int) -> None:
        cache, drafters = cast(Any, EndlessCache()), cast(Any, world.drafters())
        sizes = {"max_nodes": nodes, "max_depth": depth, "max_step_tokens": 2048}
        super().__init__(cache, drafters, load_tree_ops(CPU), min_probability=0.08, **sizes)
        self._names = frozenset(names)

    def limits(self, plan: Plan) -> Quota:
        rows = super().limits(plan).rows
        return Quota(tuple(RowQuota(r.nodes if self._names else 0, r.depth, r.drafters & self._names) for r in rows))


@pytest.mark.parametrize("prices", list(TABLES))
def test_never_slower_than_plain_or_the_best_fixed_setting(prices: str) -> None:
    table = TABLES[prices]
    ratios = {}
    for temperature in (0.0, 1.0):
        for rows in (1, 4, 16, 48):
            steps = 150 * max(table.seconds[0], table.seconds[EDGES.index(16)] * rows / 16)
            best = 0.0
            for names, nodes, depth in FIXED.values():
                world = World(recording(), temperature, rows, table)
                best = max(best, rate(world, FixedPlanner(world, names, nodes, depth), steps))
            world = World(recording(), temperature, rows, table)
            ratios[temperature, rows] = rate(world, auto(world, table), steps, warm_up=2 * steps) / best
    assert math.exp(sum(map(math.log, ratios.values())) / len(ratios)) >= 0.99
    assert min(ratios.values()) >= 0.95


def in_windows(world: World, planner: Planner, seconds: float, count: int) -> list[float]:
    return [rate(world, planner, seconds) for _ in range(count)]


def test_a_drafter_that_turns_bad_is_dropped_and_one_that_turns_good_is_found_again() -> None:
    table = TABLES["0.3B on a CPU"]
    bad = (40.0, 120.0)
    world = World(recording(), 1.0, 1, table, lambda name, now: name != "ngram" and bad[0] <= now < bad[1])
    plain_world = World(recording(), 1.0, 1, table)
    plain = rate(plain_world, FixedPlanner(plain_world, (), 0, 1), 20.0)
    planner = auto(world, table)
    windows = in_windows(world, planner, 10.0, 23)
    before, during, after = windows[2:4], windows[6:12], windows[19:]
    assert min(before) > 1.5 * plain
    assert min(during) > 0.97 * plain  # the models draft garbage, and are not asked but now and then
    assert min(after) > 0.9 * min(before)  # found again


def test_prices_that_change_are_noticed() -> None:
    """Something else takes the machine's cores: eight more tokens in a step cost four times as much as they did."""
    cheap = TABLES["GPU"]
    dear = CostTable(EDGES, tuple(4e-3 * (1 + 0.3 * (t - 1)) for t in EDGES), cheap.row, 0.0, cheap.drafters)
    world = World(recording(), 1.0, 4, cheap)
    planner = auto(world, cheap)
    rate(world, planner, 4.0)
    world.costs.replace(dear)
    rate(world, planner, 12.0)  # some six hundred steps
    settled = rate(world, planner, 16.0)
    plain_world = World(recording(), 1.0, 4, dear)
    plain = rate(plain_world, FixedPlanner(plain_world, (), 0, 1), 4.0)
    assert settled > 0.95 * plain


def test_limits_of_the_server_hold() -> None:
    table = TABLES["GPU"]
    world = World(recording(), 0.0, 3, table)
    planner = auto(world, table, max_nodes=5, max_depth=2)
    sizes: list[tuple[int, int]] = []
    choose = planner.choose

    def spy(*args: Any) -> Any:
        chosen = choose(*args)
        sizes.append((max(chosen.counts), chosen.deepest))
        return chosen

    planner.choose = spy  # type: ignore[method-assign]
    rate(world, planner, 1.0)
    assert max(count for count, _ in sizes) == 6  # and the limit is used
    assert max(depth for _, depth in sizes) == 2


def test_nothing_is_drafted_where_nothing_pays() -> None:
    """A node costs as much as a step: the planner is to be a plain engine, but for a step in two hundred."""
    cheap = TABLES["8M on a CPU"]
    table = CostTable(EDGES, tuple(1e-3 * t for t in EDGES), 0.0, 0.0, cheap.drafters)
    world = World(recording(), 1.0, 8, table)
    planner = auto(world, table)
    got = rate(world, planner, 2.0, warm_up=3.0)
    plain_world = World(recording(), 1.0, 8, table)
    assert got > 0.985 * rate(plain_world, FixedPlanner(plain_world, (), 0, 1), 2.0)
    assert all(member.sleeps for member in planner.members)


def test_the_price_of_guessing_is_learned() -> None:
    """Guesses take a hundred times as long as was measured."""
    table = TABLES["0.3B on a CPU"]
    dear = replace(table, drafters={**table.drafters, "ngram": DraftPrice(first=1e-3)})
    world = World(recording(), 0.0, 1, dear)
    planner = auto(world, table)
    rate(world, planner, 20.0)
    assert planner.costs.draft("ngram", 1, 1) == pytest.approx(1e-3, rel=0.3)
