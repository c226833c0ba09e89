"""The target's hidden states, kept for the drafters that continue from them.

A feature belongs to a token: what the target made of it. Features of committed tokens wait here, per sequence, until
the drafter reads them; the feature of each full page's last token stays with the page, so that whoever finds the page
in the prefix cache can go on without running the target again. Nothing here waits for the device: which of a tree's
nodes were accepted is known there, how many of them only a step later on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.plan import Plan
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models import kernels
from models.batch import PAGE_SIZE, RaggedBatch
from models.heads.feature_model import FeatureSource
from models.target import CausalModel, ForwardOutput
from models.transfer import upload

LOOSE_PIECES = 16  # a sequence's pieces are views into whole steps' features; beyond this they are copied into one


@dataclass(frozen=True)
class Piece:
    """Features of consecutive tokens. The newest piece of a sequence may reach beyond what was accepted."""

    start: int  # position of the first token
    end: int  # one past the last
    held: Tensor  # [m, F] features of these and of other tokens
    first: int = 0  # where in ``held`` they begin

    @staticmethod
    def whole(start: int, features: Tensor) -> Piece:
        """Features [n, F] of tokens from ``start`` on."""
        return Piece(start, start + features.shape[0], features)

    @property
    def features(self) -> Tensor:
        """[n, F]; a view is made only when it is read."""
        count = self.end - self.start
        return self.held if count == self.held.shape[0] else self.held.narrow(0, self.first, count)

    def between(self, start: int, end: int) -> Piece:
        """The part from ``start`` to ``end``, which must overlap the piece."""
        first = max(start, self.start)
        return Piece(first, min(end, self.end), self.held, self.first + first - self.start)


class FeatureStore:
    """Features of each sequence's latest tokens, and of every full page's last token.

    Args:
        source: which hidden states make a feature.
        limit: of the tokens of earlier steps, at most this many features are kept for a sequence; older ones are lost.
        keeps: sequences whose features are wanted at all.
        name: the drafter that they are for.
    """

    def __init__(self, source: FeatureSource, limit: int, keeps: Callable[[Sequence], bool], name: str) -> None:
        self._name = name
        self._taps = source.taps
        self._limit = limit
        self._keeps = keeps
        self._pieces: dict[SequenceId, list[Piece]] = {}  # in the order of positions, without holes
        self._pages: Tensor  # [num_pages, F]
        self._known = bytearray()  # [num_pages] whether a page's feature was kept when it was written

    def attach(self, num_pages: int, target: CausalModel) -> None:
        """Allocate the pages' features."""
        size = (num_pages, max(1, len(self._taps)) * target.hidden_size)
        self._known = bytearray(num_pages)
        self._pages = torch.empty(size, dtype=target.dtype, device=target.device)  # read only where it was written

    def admit(self, sequence: Sequence) -> None:
        """A sequence joins with the pages that it found: the last one's feature is there."""
        page = sequence.pages[sequence.cached // PAGE_SIZE - 1] if sequence.cached else 0
        if sequence.cached and self._keeps(sequence) and self._known[page]:
            self._pieces[sequence.id] = [Piece.whole(sequence.cached - 1, self._pages[page : page + 1])]

    def forget(self, sequence: SequenceId) -> None:
        self._pieces.pop(sequence, None)

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """Keep the features of the step's chains and of its accepted paths."""
        if all(self._name in row.sequence.unfollowed for row in plan.rows):
            self._let_pass(plan, 1 + verdict.path.shape[1])
            return
        heads = _Heads(plan, self._keeps)
        parts = [out.taps[tap] for tap in self._taps] or [out.hidden]
        tail = 1 + verdict.path.shape[1]  # the root and the path below it, as long as the longest
        if not heads.rows and kernels.serves(parts[0].device, parts[0].dtype):
            ends = torch.ops.saccade.gather_paths.default(parts, batch.wanted, nodes.first, verdict.path)
            gathered = ends
        else:
            gathered = _gather(parts, heads, batch, nodes, verdict)
            ends = gathered[: tail * len(plan.deciding)]
            if heads.rows:
                ends = ends.clone()  # they are kept for longer than the chains of prompts, which may be large
        for number, row in enumerate(plan.rows):
            if self._keeps(row.sequence):
                new = []
                if number in heads.rows:
                    first, count = heads.rows[number]
                    first += tail * len(plan.deciding)
                    new.append(Piece.whole(row.start, gathered[first : first + count]))
                if number < len(plan.deciding):
                    root = row.end - 1
                    new.append(Piece(root, root + tail, ends, number * tail))
                self._append(row.sequence.id, row.start, new)
            else:
                self._pieces.pop(row.sequence.id, None)  # followed no longer: what comes next would not join on
        self._keep_pages(plan, heads, gathered, tail)

    def _let_pass(self, plan: Plan, tail: int) -> None:
        """The drafter sleeps: the features are not there, and the pages that the rows write to will have none."""
        for row in plan.rows:
            sequence = row.sequence
            if sequence.id in self._pieces:
                del self._pieces[sequence.id]
            for page in sequence.pages[row.start // PAGE_SIZE : (row.end - 1 + tail) // PAGE_SIZE + 1]:
                self._known[page] = 0

    def first(self, sequence: SequenceId) -> int | None:
        """Position of the first token whose feature is here; all later known ones are here too."""
        pieces = self._pieces.get(sequence)
        return pieces[0].start if pieces else None

    def take(self, sequence: SequenceId, start: int, end: int) -> list[Tensor]:
        """Features of tokens start .. end - 1, in pieces [n, F]; from ``first`` on, not beyond what is committed."""
        wanted = [p.between(start, end) for p in self._pieces[sequence] if p.start < end and start < p.end]
        return [piece.features for piece in wanted]

    def drop(self, sequence: SequenceId, before: int) -> None:
        """Features of tokens before this position are not needed any more."""
        pieces = self._pieces.get(sequence, [])
        while pieces and pieces[0].end <= before:
            del pieces[0]
        if pieces and before - pieces[0].start >= PAGE_SIZE:  # the end of a chunk is not to keep all of it alive
            rest = pieces[0].between(before, pieces[0].end)
            pieces[0] = Piece.whole(rest.start, rest.features.clone())

    def last(self, sequence: Sequence) -> Tensor | None:
        """[F] the feature of the token before the last one, whose own is not computed yet.

        None where it is not known: a prompt's last chunk is what is run now.
        """
        position = sequence.length - 2
        for piece in self._pieces.get(sequence.id, []):
            if piece.start <= position < piece.end:
                return piece.features[position - piece.start]
        return None

    def _append(self, sequence: SequenceId, start: int, new: list[Piece]) -> None:
        """Pieces of a step whose chain began at ``start``: that is where the accepted part of the older ones ends."""
        oldest = start - self._limit
        pieces = [p.between(oldest, start) for p in self._pieces.get(sequence, []) if p.end > oldest]
        if len(pieces) > LOOSE_PIECES:
            pieces = [Piece.whole(pieces[0].start, torch.cat([piece.features for piece in pieces]))]
        self._pieces[sequence] = pieces + new

    def _keep_pages(self, plan: Plan, heads: _Heads, gathered: Tensor, tail: int) -> None:
        """Store the features of tokens that end a page.

        Beyond the accepted path that is a page of the sequence's own, not full yet and written again when it is.
        """
        source, target = [], []
        for number, row in enumerate(plan.deciding):
            pages, root = row.sequence.pages, row.end - 1
            for last in range(root | (PAGE_SIZE - 1), min(root + tail, len(pages) * PAGE_SIZE), PAGE_SIZE):
                source.append(number * tail + last - root)
                target.append(pages[last // PAGE_SIZE])
        source += [len(plan.deciding) * tail + at for at in heads.page_ends]
        target += heads.pages
        if source:
            for page in target:
                self._known[page] = 1
            [where] = upload(gathered.device, np.array([source, target]))
            self._pages.index_copy_(0, where[1], gathered.index_select(0, where[0]))


def _gather(parts: list[Tensor], heads: _Heads, batch: RaggedBatch, nodes: Nodes, verdict: Verdict) -> Tensor:
    """[n, F] the parts side by side, of each row's root and the path below it, then of the chains before the roots."""
    at = nodes.first
    if verdict.path.shape[1]:
        at = (at[:, None] + torch.nn.functional.pad(verdict.path.clamp(min=0), (1, 0))).flatten()
    index = batch.wanted[at]
    if heads.rows:
        [where] = upload(index.device, heads.where())
        index = torch.cat([index, batch.row_starts[where[0]] + where[1]])
    taken = [part.index_select(0, index) for part in parts]
    return torch.cat(taken, dim=1) if len(taken) > 1 else taken[0]


class _Heads:
    """The chain tokens before the roots (all of a chain that has none): which are gathered, one after the other.

    Of sequences whose features nobody keeps, only the last tokens of pages.
    """

    def __init__(self, plan: Plan, keeps: Callable[[Sequence], bool]) -> None:
        self.rows: dict[int, tuple[int, int]] = {}  # row -> (first, count) of what is gathered
        self.page_ends: list[int] = []  # which of the gathered tokens end a page,
        self.pages: list[int] = []  # and which page
        self._offsets: list[np.ndarray] = []
        total = 0
        for number, row in enumerate(plan.rows):
            end = row.end - 1 if number < len(plan.deciding) else row.end
            if end <= row.start:
                continue
            last = np.arange(row.start | (PAGE_SIZE - 1), end, PAGE_SIZE)
            positions = np.arange(row.start, end) if keeps(row.sequence) else last
            self.page_ends += (total + np.searchsorted(positions, last)).tolist()
            self.pages += [row.sequence.pages[page] for page in (last // PAGE_SIZE).tolist()]
            self.rows[number] = (total, len(positions))
            self._offsets.append(positions - row.start)
            total += len(positions)

    def where(self) -> np.ndarray:
        """[2, n] the row of each gathered token, and how far it stands behind the row's first; there must be rows."""
        row = np.repeat(list(self.rows), [count for _, count in self.rows.values()])
        return np.stack([row, np.concatenate(self._offsets)])
