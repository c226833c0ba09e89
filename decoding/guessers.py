"""The drafters that run no model, as the planner sees them: which of them are asked.

Guessing is cheap, not free: with many rows a drafter must earn its time. One that pins nodes must earn these, too; they
are bought whatever they promise. Whoever does not rests, and is tried now and then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.costs import CostModel
from decoding.drafters.base import Drafter
from decoding.market import slope_of
from decoding.plan import Plan, Quota
from decoding.proposal_ops import ProposalOps
from models.tree import PINS, Trees

WORTH_RATE = 0.05
TRY = 16  # steps of a try of a drafter that pins nodes: what these bring comes later
LIGHT_LOOK = 4  # light steps for which one tells who is worth being asked
HOPE = (1 - WORTH_RATE) ** -TRY  # times its price is lent to it then, which is used up at the end unless it earns more


@dataclass
class Guesser:
    """A drafter that runs no model."""

    bit: int
    name: str
    pins: bool = False
    worth: float = 1.0  # seconds that its guesses save in a step, fading
    credit: float = 0.0  # seconds saved up for trying it
    pinned: float = 0.0  # nodes that it pins in a row, as seen last

    def judge(self, saved: float, steps: int = 1) -> None:
        """A step's guesses were to save so many seconds; it stands for so many steps."""
        self.worth += (1 - (1 - WORTH_RATE) ** steps) * (saved - self.worth)

    def is_due(self, price: float, steps: int = 1) -> bool:
        """Whether it is to be asked for so many steps, at this price of a step in which it is."""
        if self.pins and self.worth < price and self.credit >= TRY * price:
            self.worth, self.credit = HOPE * price, 0.0
        return self.worth >= price or (not self.pins and self.credit >= steps * price)


class Guessers:
    """All of them. ``members`` are in the order of their bits."""

    def __init__(self, drafters: list[Drafter], costs: CostModel, ops: ProposalOps, depth: int) -> None:
        weighed = [(bit, drafter) for bit, drafter in enumerate(drafters) if not drafter.needs.automatic]
        hosts = [(bit, drafter) for bit, drafter in weighed if drafter.needs.host]
        self.members = [Guesser(bit, drafter.name, drafter.needs.pins) for bit, drafter in hosts]
        self.pinning = [member for member in self.members if member.pins]
        self.names = frozenset(member.name for member in self.members)
        self.asking: dict[str, int] = {}  # those that were asked last, and for how many rows
        self._others = [member for member in self.members if not member.pins]
        self._resting: set[str] = set()  # of these, those that rest in light steps
        self._light_steps = 0
        self._costs = costs
        self._ops = ops
        self._depth = depth

    def ask(self, limits: Quota, tokens: int) -> Quota:
        """The limits without those that are not worth their time, in a step of so many query tokens without drafts."""
        return _without(self._not_worth_it(self.members, limits, tokens), limits)

    def ask_lightly(self, limits: Quota, tokens: int) -> Quota:
        """The same with less thought: who pins nothing is looked at once in ``LIGHT_LOOK`` steps."""
        self._light_steps += 1
        if self._light_steps % LIGHT_LOOK == 0:
            self._resting = self._not_worth_it(self._others, limits, tokens, LIGHT_LOOK)
        resting = self._resting
        if self.pinning:
            resting = resting | self._not_worth_it(self.pinning, limits, tokens)
        return _without(resting, limits)

    def asked(self, limits: Quota) -> frozenset[str]:
        """The names of those that are asked for any row."""
        named: frozenset[str] = frozenset().union(*[row.drafters for row in limits.rows])
        return self.names & named

    def save(self, seconds: float) -> None:
        """So much time may go into trying each of them."""
        for member in self.members:
            member.credit += seconds

    def pinned(self, guesses: Mapping[int, Trees], limits: Quota) -> list[int]:
        """[R] nodes that each row has to buy for the drafters that pin."""
        rows = torch.zeros(len(limits.rows), dtype=torch.int64)
        for member in self.pinning:
            if member.bit in guesses:
                nodes = (guesses[member.bit].source >> PINS != 0).sum(dim=1)
                there = int((nodes > 0).sum())
                member.pinned = float(nodes.sum()) / there if there else member.pinned
                rows += nodes
        return [nodes if nodes <= row.nodes else 0 for nodes, row in zip(rows.tolist(), limits.rows, strict=True)]

    def judge(
        self, plan: Plan, parts: Mapping[int, tuple[float, float]], asked: frozenset[str], steps: int = 1
    ) -> None:
        """What the guesses of those that pin nothing save, less what verifying them costs.

        Args:
            parts: by bit, expected tokens and nodes of a drafter's guesses.
            steps: for which this one stands.
        """
        pace, node = self._rates(plan)
        for member in self.members:
            if not member.pins and member.name in asked:
                tokens, nodes = parts.get(member.bit, (0.0, 0.0))
                member.judge(max(0.0, tokens * pace - nodes * node), steps)

    def judge_lightly(self, plan: Plan, guesses: Mapping[int, Trees], limits: Quota, floor: float) -> None:
        """Both judgements of a light step; that of those who pin nothing at a look, and without the market's word."""
        look = self._light_steps % LIGHT_LOOK == 0
        if not (look or self.pinning):
            return
        asked = self.asked(limits)
        if look:
            parts = {}
            for bit, trees in guesses.items():
                held, nodes = self._ops.coverage(trees, floor, self._depth)
                parts[bit] = float(held.sum()), float(nodes.sum())
            self.judge(plan, parts, asked, LIGHT_LOOK)
        self.judge_pinning(plan, guesses, asked, floor)

    def judge_pinning(self, plan: Plan, guesses: Mapping[int, Trees], asked: frozenset[str], floor: float) -> None:
        """``judge`` for those that pin nodes: by what their guesses add to the others', which need no such nodes.

        Args:
            guesses: calibrated, by bit.
            floor: nodes whose path is less probable are not counted.
        """
        for member in self.pinning:
            if member.name not in asked:
                continue
            pace, node = self._rates(plan)
            saved = 0.0
            if member.bit in guesses:
                held, nodes = self._ops.coverage(guesses[member.bit], floor, self._depth)
                gained = float((held - self._held_by_others(member, guesses, floor, held)).clamp(min=0).sum())
                saved = max(0.0, gained * pace - float(nodes.sum()) * node)
            member.judge(saved)
            # however good it has been, it is given up in time when it turns bad
            member.worth = min(member.worth, HOPE * self._price(member, len(plan.deciding), plan.chain_tokens))

    def _held_by_others(self, member: Guesser, guesses: Mapping[int, Trees], floor: float, held: Tensor) -> Tensor:
        """[R, D] what the other guesses hold of the text, by depth."""
        others = torch.zeros_like(held)
        for bit, trees in guesses.items():
            if bit != member.bit:
                others = torch.maximum(others, self._ops.coverage(trees, floor, self._depth)[0])
        return others

    def _rates(self, plan: Plan) -> tuple[float, float]:
        """Seconds of a token, what prompts take left out, and of one more node."""
        rows = len(plan.deciding)
        return self._costs.at(rows) / rows, slope_of(plan.chain_tokens, self._costs)

    def _price(self, member: Guesser, rows: int, tokens: int) -> float:
        """Seconds that a step takes longer with a drafter that guesses for so many rows."""
        drafting = self._costs.draft(member.name, rows, 1)
        return drafting + self._costs.at(tokens + member.pinned * rows) - self._costs.at(tokens)

    def _not_worth_it(self, members: list[Guesser], limits: Quota, tokens: int, steps: int = 1) -> set[str]:
        """The names of those that are to rest for so many steps; ``asking`` has the others."""
        resting = set()
        self.asking = {}
        for member in members:
            rows = sum(1 for row in limits.rows if row.nodes and member.name in row.drafters)
            if not rows:
                continue  # there was no question; the next steps may have rows for it
            if not member.is_due(self._price(member, rows, tokens), steps):
                resting.add(member.name)
                continue
            self.asking[member.name] = rows
            if not member.pins:
                member.credit = 0.0
        return resting


def _without(names: set[str], limits: Quota) -> Quota:
    """The limits with these drafters asked for no row."""
    if not names:
        return limits
    return Quota(tuple(replace(row, drafters=row.drafters - names) for row in limits.rows))
