"""What a request's grammar forces: after ``{"name`` the two characters ``":`` and whatever else must come.

It needs no option and no ``--speculate``: requests with a grammar have it unless speculation is off for them. That the
bytes must come does not say which tokens spell them, so this is a guess like any other's, and the draw decides; but the
masks ask for the tokenizer's own spelling too, so it is almost never wrong, and it costs no model.
"""

from __future__ import annotations

from decoding.drafters.base import Needs, TokenDrafter
from decoding.drafters.rows import last_tokens
from decoding.drafters.tries import Node, as_trees
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from models.tree import Trees

NAME = "forced"


class ForcedDrafter(TokenDrafter):
    """Drafts for requests with a grammar; others never ask it."""

    needs = Needs(host=True, automatic=True)

    def __init__(self, bit: int) -> None:
        self.name = NAME
        self._bit = bit

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        rows = zip(plan.deciding, quota.rows, strict=True)
        chains = [self._chain(row.sequence, limit) for row, limit in rows]
        return as_trees(chains, last_tokens(plan), self._bit)

    def _chain(self, sequence: Sequence, limit: RowQuota) -> list[Node]:
        if sequence.matcher is None or self.name not in limit.drafters:
            return []
        forced = sequence.matcher.forced()[: min(limit.nodes, limit.depth)]
        return [(depth, token, 1.0) for depth, token in enumerate(forced)]
