"""A tree of candidates grown by a small model, one pass a depth (2406.16858, section 4.1; coupled guesses).

Every pass runs the ``beam`` most probable nodes of each row and proposes ``top_k`` children of each. What it writes
goes to scratch slots behind the chains and is never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decoding.cache import scratch_slots
from decoding.errors import ConfigError
from decoding.plan import UNGUIDED, Guide
from decoding.sampling import Sampling
from models.batch import MAX_TREE, PAGE_SIZE, RaggedBatch
from models.tree import NO_PARENT, Trees


@dataclass(frozen=True)
class TreeOptions:
    """What the drafters with a model of their own have in common."""

    path: str
    depth: int = 8  # passes of the drafter's model a step, the catch-up pass included
    top_k: int = 4  # children of an expanded node
    beam: int = 2  # nodes expanded per depth
    tau: float = 1.0  # confidence = softmax(z / tau)
    min_confidence: float = 0.3  # drafting ends where no path is more probable

    def check(self, drafter: str) -> None:
        """Check the ranges.

        Raises:
            ConfigError: naming the drafter and the options.
        """
        if min(self.depth, self.top_k, self.beam) < 1 or self.beam * (self.depth - 1) >= MAX_TREE:
            raise ConfigError(f"{drafter}: depth, top_k and beam must be at least 1, and beam * (depth - 1) under 64")
        if not self.tau > 0:
            raise ConfigError(f"{drafter}: tau must be positive")

    def scratch_slots(self, depth: int) -> int:
        """Slots behind the chain that a tree of this depth takes while it grows."""
        return self.beam * (min(depth, self.depth) - 1)


@dataclass(frozen=True)
class Beam:
    """The B nodes of each drafting row that are expanded next."""

    columns: Tensor  # [S, B] int64, their columns in the tree of candidates
    tokens: Tensor  # [S, B] int64
    masks: Tensor  # [S, B] int64, ancestors-or-self among the scratch nodes
    chance: Tensor  # [S, B] float32, path probability
    carry: Tensor | None  # [S * B, C], what their own pass takes of their parents'; None: the model takes nothing
    paths: Tensor | None  # [S, B, d] int64, tokens from depth 1 on; None unless penalties ask for them


Pass = Callable[[RaggedBatch, Tensor | None, int], tuple[Tensor, Tensor | None]]
"""(draft nodes [T], their parents' carry [T, C], their depth >= 1) -> (hidden states [T, H], their carry [T, C])."""


class Growth(Protocol):
    """How trees come out of a model's pass over the chains that end in their roots."""

    def grow(
        self,
        roots: Trees,
        batch: RaggedBatch,
        hidden: Tensor,
        carry: Tensor | None,
        row: Tensor,
        depth: int,
        sampling: Sampling,
        guide: Guide = UNGUIDED,
    ) -> Trees:
        """The trees of candidates of S rows.

        Args:
            roots: the rows' last tokens.
            batch: the pass over the chains that end in the roots, those of the S rows first; its ``wanted`` are the
                roots.
            hidden: [S, H] of the roots.
            carry: [S, C] of the roots, if the model has any.
            row: [S] the rows' numbers in ``sampling``.
            depth: of the trees, at least 1.
            guide: its taus and least gain hold here.
        """
        ...


@dataclass(frozen=True)
class Expansion:
    """Grows trees with one model, a pass a depth."""

    options: TreeOptions
    source: int  # the drafter's bit
    last_position: int  # of the model's RoPE table
    forward: Pass
    logits: Callable[[Tensor], Tensor]
    token_ids: Tensor | None = None  # [V'] the target's ids of a draft vocabulary

    def grow(
        self,
        roots: Trees,
        batch: RaggedBatch,
        hidden: Tensor,
        carry: Tensor | None,
        row: Tensor,
        depth: int,
        sampling: Sampling,
        guide: Guide = UNGUIDED,
    ) -> Trees:
        """See ``Growth.grow``."""
        rows, device = len(row), row.device
        zeros = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        paths = zeros.new_zeros(rows, 1, 0) if sampling.needs_paths() else None
        beam = Beam(zeros, roots.tokens, zeros + 1, roots.confidence, None, paths)
        columns = [(roots.tokens, roots.parents, roots.confidence)]
        width, scratch = 1, 0
        for level in range(depth):
            tokens, confidence = self._guess(hidden, row, level, beam, sampling, guide.tau(level))  # [S, B, K]
            parents = beam.columns[:, :, None].expand_as(tokens)
            columns.append((tokens.flatten(1), parents.flatten(1), confidence.flatten(1)))
            chance = (beam.chance[:, :, None] * confidence).flatten(1)
            if level + 1 == depth or (device.type == "cpu" and self._ends(chance, guide)):
                break
            beam = self._choose(beam, tokens.flatten(1), chance, carry, width, scratch)
            hidden, carry = self._forward(batch, rows, beam, level + 1, scratch)
            width += chance.shape[1]
            scratch += beam.tokens.shape[1]
        all_tokens, all_parents, all_confidence = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
        source = torch.where(all_parents == NO_PARENT, 0, self.source)
        return Trees(all_tokens, all_parents, all_confidence, source)

    def _ends(self, chance: Tensor, guide: Guide) -> bool:
        """Whether another pass is not worth it, by the last level's path probabilities [S, B * K]."""
        if guide.least_gain is None:
            return float(chance.max()) < self.options.min_confidence
        return float(chance.amax(dim=1).sum()) < guide.least_gain

    def _choose(
        self, beam: Beam, tokens: Tensor, chance: Tensor, carry: Tensor | None, first: int, scratch: int
    ) -> Beam:
        """The most probable of the candidates [S, B * K] that the last level added from column ``first`` on.

        ``carry`` [S * B, C] is what the beam's own pass gave.
        """
        wide, size = beam.tokens.shape[1], min(self.options.beam, tokens.shape[1])
        best = chance.topk(size, dim=1)
        pick, parent = best.indices, best.indices // (tokens.shape[1] // wide)
        picked = tokens.gather(1, pick)
        # the root is scratch node 0 and lies in the chain; node i lies i - 1 slots behind it
        bits = torch.ones_like(pick) << (1 + scratch + torch.arange(size, device=pick.device))
        if carry is not None:
            first_of_row = torch.arange(0, len(carry), wide, device=pick.device)
            carry = carry[(first_of_row[:, None] + parent).flatten()]
        paths = None
        if beam.paths is not None:
            before = beam.paths.gather(1, parent[:, :, None].expand(-1, -1, beam.paths.shape[2]))
            paths = torch.cat([before, picked[:, :, None]], dim=2)
        return Beam(first + pick, picked, beam.masks.gather(1, parent) | bits, best.values, carry, paths)

    def _forward(
        self, batch: RaggedBatch, rows: int, beam: Beam, level: int, scratch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and carry [S * B] of the beam's nodes, whose K/V goes to scratch slots behind the chains."""
        size, device = beam.tokens.shape[1], beam.tokens.device
        base = batch.tree_base[:rows].long()
        logical = base[:, None] + 1 + scratch + torch.arange(size, device=device)
        table = batch.page_table[:rows]
        positions = batch.positions[batch.wanted] + level  # a drafter's position need not be the logical index
        step = RaggedBatch(
            token_ids=beam.tokens.flatten(),
            positions=positions.clamp(max=self.last_position).repeat_interleave(size),
            slots=scratch_slots(table, logical).flatten(),
            visible=(batch.tree_base[:rows] + 1).repeat_interleave(size),
            tree_mask=beam.masks.flatten(),
            row_of=torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(size),
            row_starts=torch.arange(0, rows * size + 1, size, dtype=torch.int32, device=device),
            tree_base=batch.tree_base[:rows],
            page_table=table,
            wanted=torch.arange(rows * size, device=device),
            max_query=size,
            max_keys=min(batch.max_keys + scratch + size, table.shape[1] * PAGE_SIZE),
        )
        return self.forward(step, beam.carry, level)

    def _guess(
        self, hidden: Tensor, row: Tensor, level: int, beam: Beam, sampling: Sampling, tau: float
    ) -> tuple[Tensor, Tensor]:
        """(tokens, confidence) [S, B, K]: the drafter's most probable next tokens after each node of the beam."""
        size = beam.tokens.shape[1]
        node_row = row.repeat_interleave(size)
        depth = torch.full_like(node_row, level)
        paths = beam.paths.flatten(0, 1) if beam.paths is not None else None
        x = sampling.process(self.logits(hidden), node_row, depth, paths, self.token_ids)
        options = self.options
        tokens, confidence = sampling.guess(x, node_row, depth, options.top_k, tau * options.tau, self.token_ids)
        return tokens.view(-1, size, tokens.shape[1]), confidence.view(-1, size, tokens.shape[1])
