"""Known texts dictated to the engine, token by token, while drafters propose at every position.

What the drafters propose is scored against the text as it goes on, and then withheld: the step verifies roots alone, so
a replay costs the target one token per row. Two measurements:

- ``ReplayTeam``: how deep the tree that the planner would verify follows the text;
- ``OracleTeam``: at each depth, the rank of the right token among the drafter's guesses. The drafter is led: what it
  expands next is always the right token, so each depth is judged given that the path so far was right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.drafters.base import Drafter
from decoding.drafters.team import DrafterTeam, Proposal
from decoding.plan import Plan, Quota
from decoding.planner import StaticPlanner
from decoding.sampling import Sampling
from decoding.verify import Verdict
from models.tree import Trees, mask_depths, walk

LISTED = 8  # guesses among which the right token is looked for


class Dictation(DrafterTeam, ABC):
    """Drafters that see known texts come into being; their proposals go no further.

    A position is scored if it is not the first, which belongs to the prompt's own step, and the text goes on from it
    for more than ``depth`` tokens.

    Args:
        texts: request id -> all tokens of its text [L] int64, on the target's device.
        depth: D, how deep trees are to reach.
    """

    def __init__(self, members: list[Drafter], texts: Mapping[str, Tensor], depth: int) -> None:
        super().__init__(members)
        self._texts = texts
        self.depth = depth
        self.guesses: list[Proposal] = []  # of this step
        self._due: Tensor

    def guess(self, plan: Plan, limits: Quota, sampling: Sampling) -> list[Proposal]:
        """Let the drafters without a model propose, and hand nothing on."""
        self.guesses = super().guess(plan, limits, sampling)
        return []

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> list[Proposal]:
        """Let the drafters propose, and hand nothing on."""
        future = self._future(plan, sampling.next_position.device)
        self._due = future[:, 0]
        if plan.deciding:
            scored = [
                row.sequence.generated > 0 and row.sequence.limit - row.sequence.length > self.depth
                for row in plan.deciding
            ]
            self.listen(plan, quota, sampling, future, scored)
        return []

    @abstractmethod
    def listen(self, plan: Plan, quota: Quota, sampling: Sampling, future: Tensor, scored: list[bool]) -> None:
        """Let the drafters propose for the rows that decide, and note what is to be measured at those to be scored.

        Args:
            future: [S, D + 1] int64, each row's next tokens, padded with -1.
        """

    def dictate(self, trees: Trees, nodes: Nodes, x: Tensor, sampling: Sampling, deepest: int) -> Verdict:
        """The rule of the dictation, see ``Rule``: whatever the logits say, the text's next token is drawn."""
        return Verdict.plain(self._due)

    def _future(self, plan: Plan, device: torch.device) -> Tensor:
        future = torch.full((len(plan.deciding), self.depth + 1), -1, device=device)
        for index, row in enumerate(plan.deciding):
            ahead = self._texts[row.sequence.id[0]][row.sequence.length :][: self.depth + 1]
            future[index, : len(ahead)] = ahead
        return future


class ReplayTeam(Dictation):
    """Scores the trees that the planner would have verified.

    Attributes:
        accepted: request id -> drafted tokens that would be accepted, of each scored position.
        drafted: nodes of the trees at these positions.

    Raises:
        ValueError: a drafter that learns from what is drawn at its nodes; here nothing is drawn.
    """

    def __init__(self, members: list[Drafter], texts: Mapping[str, Tensor], depth: int, planner: StaticPlanner) -> None:
        for member in members:
            if member.needs.draws:
                raise ValueError(
                    f"{member.name} learns from what is drawn at its nodes, so it cannot be replayed: decode"
                )
        super().__init__(members, texts, depth)
        self._planner = planner
        self.accepted: dict[str, list[int]] = defaultdict(list)
        self.drafted = 0

    def listen(self, plan: Plan, quota: Quota, sampling: Sampling, future: Tensor, scored: list[bool]) -> None:
        """See ``Dictation``."""
        proposals = self.guesses + DrafterTeam.propose(self, plan, quota, sampling)
        chosen = self._planner.choose(plan, proposals, quota, future.device)
        drawn = future.gather(1, mask_depths(chosen.masks).clamp(0, self.depth))
        accepted = walk(chosen.trees, chosen.masks, drawn, chosen.deepest)[0].tolist()
        for row, counts, reached, nodes in zip(plan.deciding, scored, accepted, chosen.counts, strict=True):
            if counts:
                self.accepted[row.sequence.id[0]].append(reached)
                self.drafted += nodes - 1


@dataclass(frozen=True)
class LedSampling(Sampling):
    """A step's sampling whose guesses are always right at first, so that a drafter goes on from the right token."""

    future: Tensor  # [S, D + 1] int64, each row's next tokens, padded with -1
    ranks: Tensor  # [S, D + 1] int64, written by ``guess``: rank of the right token; LISTED: not listed; -1: not asked

    @staticmethod
    def of(sampling: Sampling, future: Tensor) -> LedSampling:
        """With the parameters of another."""
        given = {each.name: getattr(sampling, each.name) for each in fields(Sampling)}
        return LedSampling(**given, future=future, ranks=torch.full_like(future, -1))

    def guess(
        self, x: Tensor, row: Tensor, depth: Tensor, k: int, tau: float, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Note the right token's rank and put it first, with all the confidence.

        Of several nodes of a row and depth the first is taken for the one that the right tokens lead to: drafters
        expand the most probable path first, and that is what the right tokens are made here.
        """
        best, _ = super().guess(x, row, depth, max(k, LISTED), tau, ids)
        right = self.future[row, depth]
        right = torch.where(right < 0, best[:, 0], right)  # behind the text's end anything is right
        hit = best == right[:, None]
        rank = torch.where(hit[:, :LISTED].any(dim=1), hit.to(torch.uint8).argmax(dim=1), LISTED)
        fresh = self.ranks[row, depth] < 0
        for index in _firsts(row * self.ranks.shape[1] + depth).tolist():
            if fresh[index]:
                self.ranks[row[index], depth[index]] = rank[index]
        order = (~hit).to(torch.uint8).argsort(dim=1, stable=True)
        led = torch.where(
            hit.any(dim=1, keepdim=True), best.gather(1, order), torch.cat([right[:, None], best[:, :-1]], dim=1)
        )[:, :k]
        confidence = torch.zeros_like(led, dtype=torch.float32)
        confidence[:, 0] = 1.0
        return led, confidence


class OracleTeam(Dictation):
    """Leads its one drafter along the texts and notes the ranks of the right tokens.

    Attributes:
        ranks: of each scored position, the rank (``LISTED``: not listed) of the right token at each depth that the
            drafter reaches; empty for drafters that do not guess by ``Sampling.guess``.
    """

    def __init__(self, members: list[Drafter], texts: Mapping[str, Tensor], depth: int) -> None:
        super().__init__(members, texts, depth)
        self.ranks: list[tuple[int, ...]] = []

    def listen(self, plan: Plan, quota: Quota, sampling: Sampling, future: Tensor, scored: list[bool]) -> None:
        """See ``Dictation``."""
        led = LedSampling.of(sampling, future)
        DrafterTeam.propose(self, plan, quota, led)
        for ranks, counts in zip(led.ranks.tolist(), scored, strict=True):
            asked = [rank for rank in ranks[: self.depth] if rank >= 0]
            if counts and asked:
                self.ranks.append(tuple(asked))


def _firsts(keys: Tensor) -> Tensor:
    """Indices of the first occurrence of each value."""
    order = keys.argsort(stable=True)
    ordered = keys[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new]
