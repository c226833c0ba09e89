"""Planners driven into their corners: prices that change by the step, drafters that fall asleep and wake up."""

from __future__ import annotations

import random
from collections.abc import Callable

from decoding.auto_planner import AutoPlanner
from decoding.costs import EDGES, CostTable, DraftPrice
from decoding.engine import Engine
from decoding.market import DORMANT
from decoding.plan import Plan, Quota


def make_moody(engine: Engine, mood: int) -> None:
    """Let an engine's planner, if it weighs, see other prices every few steps; nothing happens to a fixed plan."""
    planner = engine._stepper.planner
    if isinstance(planner, AutoPlanner):
        engine._stepper.planner = MoodyPlanner(planner, random.Random(mood))


class MoodyPlanner:
    """A planner whose world changes before every step. All the rest is the planner's."""

    def __init__(self, inner: AutoPlanner, luck: random.Random) -> None:
        self.inner = inner
        self._luck = luck
        self.quota, self.choose, self.learn, self.forget = inner.quota, inner.choose, inner.learn, inner.forget

    @property
    def gear(self) -> str:
        return self.inner.gear

    def limits(self, plan: Plan) -> Quota:
        if self._luck.random() < 0.4:
            self.inner.costs.replace(self._prices(self._luck.random))
        for member in self.inner.members:
            if self._luck.random() < 0.2:
                member.unused = self._luck.choice([0, DORMANT])
                member.used_at = self._luck.choice([0, 10**9])
            member.credit = self._luck.choice([0.0, 1e9])
        return self.inner.limits(plan)

    def _prices(self, draw: Callable[[], float]) -> CostTable:
        node, drafting = draw() ** 8, draw() ** 8
        seconds = tuple(1.0 + node * (edge - 1) for edge in EDGES)
        price = DraftPrice(drafting, drafting, drafting, drafting * draw(), draw() / 8)
        return CostTable(EDGES, seconds, draw(), draw() / 64, dict.fromkeys(self.inner.costs.table.drafters, price))
