"""How much each row may speculate, and which nodes are verified: what a planner is, and the one of fixed limits.

The planner of the engine by default, which weighs what drafts cost, is in auto_planner.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from decoding.cache import SequenceCache
from decoding.drafters.base import Drafter
from decoding.drafters.team import Proposal
from decoding.plan import NOTHING, Plan, PlannedRow, Quota, RowQuota
from decoding.sequence import Sequence, SequenceId
from models.transfer import upload
from models.tree_ops import ChosenTrees, TreeOps


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on the host's clock."""

    all: float
    drafters: dict[str, float]  # in each drafter's proposing and observing
    reading: float = 0.0  # before it, in which drafters read the prompts of the step before


class Planner(Protocol):
    """Nodes are bought in these places of a step, and nowhere else."""

    def limits(self, plan: Plan) -> Quota:
        """The most that each deciding row may have, by its client and the text that is left."""
        ...

    def quota(self, plan: Plan, limits: Quota, guesses: list[Proposal]) -> Quota:
        """What each row gets, within the limits; fixed before a model drafts.

        Reserves the slots that trees and drafting need; rows without them get no nodes.

        Args:
            guesses: proposals of the drafters that run no model, which are made first.
        """
        ...

    def choose(self, plan: Plan, proposals: list[Proposal], quota: Quota, device: torch.device) -> ChosenTrees:
        """Merge the drafters' trees and keep each row's best nodes within its quota."""
        ...

    def learn(self, plan: Plan, chosen: ChosenTrees, made: int, times: StepTimes) -> None:
        """The step is over: the tokens are appended.

        Args:
            made: tokens of the verdicts, bonus tokens included.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or lost its pages."""
        ...

    @property
    def gear(self) -> str:
        """What it did in the last step, as metrics tell it."""
        ...


class Limits:
    """What clients, the text's end and the drafters allow, for any planner."""

    def __init__(self, cache: SequenceCache, drafters: list[Drafter], max_nodes: int, max_depth: int) -> None:
        self._cache = cache
        self._drafters = drafters
        self._max_nodes = max_nodes
        self.max_depth = max_depth
        self._allowances: dict[SequenceId, RowQuota] = {}  # of a sequence whose text goes on for long

    def of(self, plan: Plan, share: int) -> Quota:
        """One limit for each deciding row; ``share`` is what the token budget leaves each of them in nodes."""
        if not self._drafters:
            return Quota(tuple(NOTHING for _ in plan.deciding))
        return Quota(tuple(self._row(row.sequence, share) for row in plan.deciding))

    def reserved(self, plan: Plan, share: int) -> Quota:
        """The same, with the slots that all of it needs; rows without them get nothing."""
        asked = zip(plan.deciding, self.of(plan, share).rows, strict=True)
        return Quota(tuple(m if m.nodes and self.reserve(row, m) else NOTHING for row, m in asked))

    def _row(self, sequence: Sequence, share: int) -> RowQuota:
        allowed = self._allowances.get(sequence.id)
        if allowed is None:
            allowed = self._allowances[sequence.id] = self._allowance(sequence)
        # a path of depth m commits m + 1 tokens
        left = sequence.limit - sequence.length - 1
        if left >= allowed.depth and share >= allowed.nodes:
            return allowed
        depth, nodes = min(allowed.depth, left), min(allowed.nodes, share)
        return RowQuota(nodes, depth, allowed.drafters) if depth >= 1 and nodes >= 1 else NOTHING

    def _allowance(self, sequence: Sequence) -> RowQuota:
        """What the client allows."""
        wish = sequence.speculation
        depth, nodes = _limit(self.max_depth, wish.max_depth), _limit(self._max_nodes, wish.max_nodes)
        structured = sequence.request.grammar is not None
        names = frozenset(
            d.name
            for d in self._drafters
            if (structured if d.needs.automatic else wish.drafters is None or d.name in wish.drafters)
        )
        return RowQuota(nodes, depth, names) if wish.enabled and names and depth and nodes else NOTHING

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or lost its pages."""
        self._allowances.pop(sequence.id, None)

    def reserve(self, row: PlannedRow, limit: RowQuota) -> bool:
        """Get the slots that the row's tree and its drafting need; False where the pool has none."""
        # drafters run as deep as the deepest row of the batch, hence not the row's own depth
        scratch = max(d.scratch_slots(self.max_depth) for d in self._drafters if d.name in limit.drafters)
        return self.reserve_slots(row, max(limit.nodes, scratch))

    def reserve_slots(self, row: PlannedRow, slots: int) -> bool:
        """Get so many slots behind the row's chain; False where the pool has none."""
        return self._cache.reserve(row.sequence, row.end + slots)


class Certain:
    """Limits of what is drafted without any doubt: whatever it costs, it saves more, so nothing is weighed."""

    def __init__(
        self, cache: SequenceCache, drafters: list[Drafter], max_nodes: int, max_depth: int, max_step_tokens: int
    ) -> None:
        drafters = [drafter for drafter in drafters if drafter.needs.automatic]
        self.names = frozenset(drafter.name for drafter in drafters)
        self._limits = Limits(cache, drafters, max_nodes, max_depth)
        self._max_step_tokens = max_step_tokens

    def limits(self, plan: Plan) -> Quota | None:
        """Reserved for these drafters alone; None where no row has a grammar."""
        if not any(row.sequence.matcher is not None for row in plan.deciding):
            return None
        return self._limits.reserved(plan, share_of(plan, self._max_step_tokens))

    def forget(self, sequence: Sequence) -> None:
        """See ``Planner``."""
        self._limits.forget(sequence)


class StaticPlanner:
    """Every row gets ``max_nodes`` and ``max_depth``; the least probable nodes are left out.

    Args:
        min_probability: nodes whose path is less probable are not worth their place in the batch, unless their drafter
            has a fixed tree.
    """

    def __init__(
        self,
        cache: SequenceCache,
        drafters: list[Drafter],
        tree_ops: TreeOps,
        *,
        max_nodes: int,
        max_depth: int,
        max_step_tokens: int,
        min_probability: float,
    ) -> None:
        self._limits = Limits(cache, drafters, max_nodes, max_depth)
        self._tree_ops = tree_ops
        self._max_step_tokens = max_step_tokens
        self._min_probability = min_probability
        self.gear = "fixed"
        self._spared = sum(1 << bit for bit, drafter in enumerate(drafters) if drafter.needs.fixed_tree)

    def limits(self, plan: Plan) -> Quota:
        """See ``Planner``: here reserved at once, and given as they are."""
        if not plan.deciding:
            return Quota(())
        return self._limits.reserved(plan, share_of(plan, self._max_step_tokens))

    def quota(self, plan: Plan, limits: Quota, guesses: list[Proposal]) -> Quota:
        return limits

    def choose(self, plan: Plan, proposals: list[Proposal], quota: Quota, device: torch.device) -> ChosenTrees:
        if not proposals or not plan.deciding:
            return roots_of(plan, device)
        nodes, depth = [row.nodes for row in quota.rows], [row.depth for row in quota.rows]
        trees = [proposal.trees.to(device) for proposal in proposals]
        return self._tree_ops.choose(trees, nodes, depth, self._min_probability, self._spared)

    def learn(self, plan: Plan, chosen: ChosenTrees, made: int, times: StepTimes) -> None:
        """Nothing to learn."""

    def forget(self, sequence: Sequence) -> None:
        """See ``Planner``."""
        self._limits.forget(sequence)


def share_of(plan: Plan, max_step_tokens: int) -> int:
    """Nodes that the token budget of a step leaves each deciding row; there must be one."""
    return max(0, max_step_tokens - plan.chain_tokens) // len(plan.deciding)


def roots_of(plan: Plan, device: torch.device) -> ChosenTrees:
    """No nodes for anybody."""
    last = [int(row.sequence.tokens[-1]) for row in plan.deciding]
    return ChosenTrees.roots(upload(device, np.array(last, dtype=np.int64))[0])


def _limit(ours: int, theirs: int | None) -> int:
    return ours if theirs is None else min(ours, theirs)
