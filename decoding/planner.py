"""How much each row may speculate, and which nodes are verified.

These are the two places in a step where nodes are bought. This planner is static: the same limits in every step, cut
to what the client, the token budget and the page pool allow.
"""

from __future__ import annotations

import numpy as np
import torch

from decoding.cache import SequenceCache
from decoding.drafters.base import Drafter
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.sequence import Sequence
from models.transfer import upload
from models.tree import Trees
from models.tree_ops import ChosenTrees, TreeOps


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
        self._cache = cache
        self._drafters = drafters
        self._tree_ops = tree_ops
        self._max_nodes = max_nodes
        self._max_depth = max_depth
        self._max_step_tokens = max_step_tokens
        self._min_probability = min_probability
        self._spared = sum(1 << bit for bit, drafter in enumerate(drafters) if drafter.needs.fixed_tree)

    def quota(self, plan: Plan) -> Quota:
        """Fixed before anything is drafted. Reserves the slots that trees and drafting need; without them, no nodes."""
        if not self._drafters or not plan.deciding:
            return Quota(tuple(RowQuota() for _ in plan.deciding))
        share = max(0, self._max_step_tokens - plan.chain_tokens) // len(plan.deciding)
        return Quota(tuple(self._row_quota(row, share) for row in plan.deciding))

    def choose(self, plan: Plan, proposals: list[Trees], quota: Quota, device: torch.device) -> ChosenTrees:
        """Merge the drafters' trees and keep the most probable nodes within the quota."""
        if not proposals or not plan.deciding:
            last = [int(row.sequence.tokens[-1]) for row in plan.deciding]
            return ChosenTrees.roots(upload(device, np.array(last, dtype=np.int64))[0])
        nodes, depth = [row.nodes for row in quota.rows], [row.depth for row in quota.rows]
        return self._tree_ops.choose(proposals, nodes, depth, self._min_probability, self._spared)

    def _row_quota(self, row: PlannedRow, share: int) -> RowQuota:
        wish, sequence = row.sequence.speculation, row.sequence
        if not wish.enabled:
            return RowQuota()
        names = frozenset(d.name for d in self._drafters if wish.drafters is None or d.name in wish.drafters)
        # a path of depth m commits m + 1 tokens
        depth = min(_limit(self._max_depth, wish.max_depth), sequence.limit - sequence.length - 1)
        nodes = min(_limit(self._max_nodes, wish.max_nodes), share)
        if not names or depth < 1 or nodes < 1 or not self._reserve(sequence, row.end, names, nodes):
            return RowQuota()
        return RowQuota(nodes, depth, names)

    def _reserve(self, sequence: Sequence, end: int, names: frozenset[str], nodes: int) -> bool:
        # drafters run as deep as the deepest row of the batch, hence not the row's own depth
        scratch = max(d.scratch_slots(self._max_depth) for d in self._drafters if d.name in names)
        return self._cache.reserve(sequence, end + max(nodes, scratch))


def _limit(ours: int, theirs: int | None) -> int:
    return ours if theirs is None else min(ours, theirs)
