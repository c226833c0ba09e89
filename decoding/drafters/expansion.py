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
from models import kernels
from models.batch import MAX_TREE, PAGE_SIZE, RaggedBatch
from models.tree import NO_PARENT, Trees, root_masks


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


@dataclass(frozen=True)
class Front:
    """A beam as the fused way keeps it: the nodes of all rows that are expanded next, B of each, row after row."""

    columns: Tensor  # [S * B] int64, their columns in the tree of candidates
    masks: Tensor  # [S * B] int64, ancestors-or-self among the scratch nodes
    chance: Tensor  # [S * B] float32, path probability
    row: Tensor  # [S * B] int64, their rows' numbers in ``Sampling``
    depth: Tensor  # [S * B] int64


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
        # penalties look at paths, which only the general way carries along
        fused = kernels.serves(row.device, torch.float32) and not sampling.needs_paths()
        grow = self._grow_fused if fused else self.grow_anywhere
        return grow(roots, batch, hidden, carry, row, depth, sampling, guide)

    def _grow_fused(
        self,
        roots: Trees,
        batch: RaggedBatch,
        hidden: Tensor,
        carry: Tensor | None,
        row: Tensor,
        depth: int,
        sampling: Sampling,
        guide: Guide,
    ) -> Trees:
        """``grow_anywhere`` with one call between two passes: see models/kernels/expansion.cpp."""
        rows, zeros = row.shape[0], torch.zeros_like(row)
        front = Front(zeros, root_masks(rows, row.device), roots.confidence, row, zeros)
        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        width, scratch = 1, 0
        for level in range(depth):
            guesses = self._guess(hidden, front.row, front.depth, None, sampling, guide.tau(level))
            tokens, confidence = (part.contiguous() for part in guesses)
            levels.append((front.columns, tokens, confidence))
            if level + 1 == depth:
                break
            front, step, parents, promise = self._next(front, tokens, confidence, batch, row, width, scratch)
            if self._ends(promise, guide):
                break
            hidden, carry = self.forward(step, None if carry is None else carry.index_select(0, parents), level + 1)
            width += tokens.numel() // rows
            scratch += step.max_query
        return Trees(*torch.ops.saccade.join_levels.default(roots.tokens, *zip(*levels, strict=True), self.source))

    def _next(
        self,
        front: Front,
        tokens: Tensor,
        confidence: Tensor,
        batch: RaggedBatch,
        row: Tensor,
        first: int,
        scratch: int,
    ) -> tuple[Front, RaggedBatch, Tensor, tuple[float, float]]:
        """The next front, the batch of its pass, its nodes' parents in the old one; what ``_ends`` asks for."""
        rows, table = row.shape[0], batch.page_table
        size = min(self.options.beam, tokens.numel() // rows)
        made = torch.ops.saccade.next_beam.default(
            *(tokens, confidence),
            *(front.columns, front.masks, front.chance, front.depth, row),
            *(first, scratch, size),
            *(batch.positions, batch.wanted, batch.tree_base, table, self.last_position),
        )
        columns, masks, chance, node_row, depth, parents, token_ids, positions, slots, visible = made[:10]
        row_of, row_starts, wanted, largest, total = made[10:]
        step = RaggedBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            visible=visible,
            tree_mask=masks,
            row_of=row_of,
            row_starts=row_starts,
            tree_base=batch.tree_base if batch.num_rows == rows else batch.tree_base[:rows],
            page_table=table if batch.num_rows == rows else table[:rows],
            wanted=wanted,
            max_query=size,
            max_keys=min(batch.max_keys + scratch + size, table.shape[1] * PAGE_SIZE),
        )
        return Front(columns, masks, chance, node_row, depth), step, parents, (largest, total)

    def grow_anywhere(
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
        """``grow`` in PyTorch, on any device: what it means."""
        rows, device = len(row), row.device
        zeros = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        paths = zeros.new_zeros(rows, 1, 0) if sampling.needs_paths() else None
        beam = Beam(zeros, roots.tokens, zeros + 1, roots.confidence, None, paths)
        columns = [(roots.tokens, roots.parents, roots.confidence)]
        width, scratch = 1, 0
        for level in range(depth):
            tokens, confidence = self._guess_beam(hidden, row, level, beam, sampling, guide.tau(level))  # [S, B, K]
            parents = beam.columns[:, :, None].expand_as(tokens)
            columns.append((tokens.flatten(1), parents.flatten(1), confidence.flatten(1)))
            chance = (beam.chance[:, :, None] * confidence).flatten(1).nan_to_num(0.0)  # NaN: a broken model's
            if level + 1 == depth or (device.type == "cpu" and self._ends(_promise(chance), guide)):
                break
            beam = self._choose(beam, tokens.flatten(1), chance, carry, width, scratch)
            hidden, carry = self._forward(batch, rows, beam, level + 1, scratch)
            width += chance.shape[1]
            scratch += beam.tokens.shape[1]
        all_tokens, all_parents, all_confidence = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
        source = torch.where(all_parents == NO_PARENT, 0, self.source)
        return Trees(all_tokens, all_parents, all_confidence, source)

    def _ends(self, promise: tuple[float, float], guide: Guide) -> bool:
        """Whether another pass is not worth it: see ``_promise``."""
        largest, total = promise
        return largest < self.options.min_confidence if guide.least_gain is None else total < guide.least_gain

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

    def _guess_beam(
        self, hidden: Tensor, row: Tensor, level: int, beam: Beam, sampling: Sampling, tau: float
    ) -> tuple[Tensor, Tensor]:
        """``_guess`` [S, B, K] for the nodes of a beam at depth ``level``."""
        size = beam.tokens.shape[1]
        node_row = row.repeat_interleave(size)
        paths = beam.paths.flatten(0, 1) if beam.paths is not None else None
        tokens, confidence = self._guess(hidden, node_row, torch.full_like(node_row, level), paths, sampling, tau)
        return tokens.view(-1, size, tokens.shape[1]), confidence.view(-1, size, tokens.shape[1])

    def _guess(
        self, hidden: Tensor, row: Tensor, depth: Tensor, paths: Tensor | None, sampling: Sampling, tau: float
    ) -> tuple[Tensor, Tensor]:
        """(tokens, confidence) [W, K]: the drafter's most probable next tokens after each node."""
        x = sampling.process(self.logits(hidden), row, depth, paths, self.token_ids)
        return sampling.guess(x, row, depth, self.options.top_k, tau * self.options.tau, self.token_ids)


def _promise(chance: Tensor) -> tuple[float, float]:
    """The largest of the last level's path probabilities [S, B * K], and the sum of each row's largest."""
    best = chance.amax(dim=1)
    return float(best.max()), float(best.sum())
