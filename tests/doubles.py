"""Drafters that know too much or nothing: they implement the protocol and drive the engine into its corners."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from decoding.drafters.base import DrafterContext, TokenDrafter
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from models.tree import NO_PARENT, Trees


class HostDrafter(TokenDrafter, ABC):
    """Base of the doubles: ``nodes`` returns (parent column, token, confidence) of each node, parents first."""

    def __init__(self, context: DrafterContext) -> None:
        self.name = context.name
        self._bit = context.bit
        self._vocab = context.target.vocab_size

    @abstractmethod
    def nodes(self, sequence: Sequence, limit: RowQuota) -> list[tuple[int, int, float]]: ...

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        proposals = [
            self.nodes(row.sequence, limit) if self.name in limit.drafters else []
            for row, limit in zip(plan.deciding, quota.rows, strict=True)
        ]
        width = 1 + max((len(nodes) for nodes in proposals), default=0)
        size = (len(proposals), width)
        tokens, parents = torch.full(size, -1), torch.full(size, NO_PARENT)
        confidence = torch.zeros(size)
        for row, (planned, nodes) in enumerate(zip(plan.deciding, proposals, strict=True)):
            tokens[row, 0], confidence[row, 0] = int(planned.sequence.tokens[-1]), 1.0
            for column, (parent, token, chance) in enumerate(nodes, start=1):
                tokens[row, column], parents[row, column], confidence[row, column] = token, parent, chance
        return Trees(tokens, parents, confidence, (parents != NO_PARENT).long() << self._bit)


class GarbageDrafter(HostDrafter):
    """Random trees of random tokens, as large as the quota."""

    def __init__(self, context: DrafterContext, seed: int = 0) -> None:
        super().__init__(context)
        self._random = np.random.default_rng(seed)

    def nodes(self, sequence: Sequence, limit: RowQuota) -> list[tuple[int, int, float]]:
        made: list[tuple[int, int, float]] = []
        depth = [0]
        children: set[tuple[int, int]] = set()
        for _ in range(limit.nodes):
            parent = int(self._random.integers(len(depth)))
            token = int(self._random.integers(self._vocab))
            if depth[parent] < limit.depth and (parent, token) not in children:
                children.add((parent, token))
                depth.append(depth[parent] + 1)
                made.append((parent, token, float(self._random.uniform(0.3, 1.0))))
        return made


class OracleDrafter(HostDrafter):
    """Proposes the true continuation, as a chain, among wrong siblings."""

    def __init__(self, context: DrafterContext, texts: dict[SequenceId, list[int]]) -> None:
        super().__init__(context)
        self.texts = texts  # all tokens, prompt included

    def wants(self, sequence: Sequence) -> bool:
        return True

    def nodes(self, sequence: Sequence, limit: RowQuota) -> list[tuple[int, int, float]]:
        known = self.texts[sequence.id][sequence.length : sequence.length + limit.depth]
        made: list[tuple[int, int, float]] = []
        parent = 0
        for token in known:
            if len(made) + 2 <= limit.nodes:
                made.append((parent, (token + 1) % self._vocab, 0.1))
            if len(made) < limit.nodes:
                made.append((parent, token if self.wants(sequence) else (token + 2) % self._vocab, 0.9))
                parent = len(made)
        return made


class AlternatingDrafter(OracleDrafter):
    """All right in one step, all wrong in the next: what a drafter keeps after accept-all and accept-none."""

    def __init__(self, context: DrafterContext, texts: dict[SequenceId, list[int]]) -> None:
        super().__init__(context, texts)
        self._turn: dict[SequenceId, int] = {}

    def wants(self, sequence: Sequence) -> bool:
        return self._turn.get(sequence.id, 0) % 2 == 0

    def nodes(self, sequence: Sequence, limit: RowQuota) -> list[tuple[int, int, float]]:
        made = super().nodes(sequence, limit)
        self._turn[sequence.id] = self._turn.get(sequence.id, 0) + 1
        return made
