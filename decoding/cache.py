"""The sequences' K/V: which pages each holds, sharing of prefixes, and keeping what was accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.prefix_cache import Key, PrefixCache, shareable_tokens
from decoding.sequence import Sequence
from decoding.verify import Verdict
from models import kernels
from models.batch import PAGE_SIZE, RaggedBatch
from models.kv_cache import KVCache

Moves = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor] | None]
"""(slots of nodes [W], index of each root [S], accepted paths [S, D], a scratch slot) -> (sources [M], targets [M]).

None: everything is in its place. Sources and targets may overlap: all are read before any is written.
"""


def needed_moves(slots: Tensor, first: Tensor, path: Tensor, scratch: int) -> tuple[Tensor, Tensor] | None:
    """Only what is not in its place; a read from the device to know how much that is."""
    in_order = torch.arange(1, path.shape[1] + 1, device=path.device)
    moved = path > in_order  # columns rise along a path, so none is below; padding is -1
    row, level = moved.nonzero(as_tuple=True)
    if len(row) == 0:
        return None
    return slots[first[row] + path[moved]], slots[first[row] + level + 1]


def all_moves(slots: Tensor, first: Tensor, path: Tensor, scratch: int) -> tuple[Tensor, Tensor]:
    """The whole of every path, of a size that the host knows; what is in its place is copied onto itself.

    Where a path has ended, the scratch slot is.
    """
    level = torch.arange(1, path.shape[1] + 1, device=path.device)
    there = path >= 0
    source = torch.where(there, first[:, None] + path, 0)
    target = torch.where(there, first[:, None] + level, 0)  # a path of m nodes is in a row with at least m more
    source, target = (torch.where(there, slots[at], scratch) for at in (source, target))
    return source.flatten(), target.flatten()


class SequenceCache:
    """Reserve, commit, release: the life of a sequence's pages.

    Args:
        kv: the target's K/V; drafters own theirs, indexed by the same page ids.
        valid_length: for a drafter bit and a sequence: up to where the drafter's K/V is written.
        drafter_bits: bits of the drafters that have K/V.
        moves: which slots an accepted path moves: ``all_moves`` where the host is not to wait for the device. Default:
            ``needed_moves``, in one call where the CPU's kernels serve.
    """

    def __init__(
        self,
        kv: KVCache,
        prefixes: PrefixCache,
        valid_length: Callable[[int, Sequence], int],
        drafter_bits: tuple[int, ...],
        moves: Moves | None = None,
    ) -> None:
        self.kv = kv
        self.prefixes = prefixes
        self._valid_length = valid_length
        self._drafter_bits = drafter_bits
        self._moves = moves or needed_moves
        self._in_one_call = moves is None and not kv.shared and kernels.serves(kv.keys.device, kv.keys.dtype)

    @property
    def num_available(self) -> int:
        return self.prefixes.pool.num_available

    def admit(self, sequence: Sequence) -> list[int]:
        """Give a sequence without pages the cached pages of its beginning; returns the pages' drafter flags."""
        if sequence.wants_prompt_logprobs():
            return []  # its prompt must be computed, not found
        hit = self.prefixes.match(sequence.tokens, sequence.request.cache_salt)
        sequence.pages, sequence.page_keys = hit.pages, hit.keys
        sequence.cached = len(hit.pages) * PAGE_SIZE
        return hit.valid

    def next_key(self, sequence: Sequence) -> Key | None:
        """The key of the first full page that an admitted sequence did not find; None if there is none such."""
        start = sequence.cached
        if start >= shareable_tokens(sequence.length) or sequence.wants_prompt_logprobs():
            return None
        return self.prefixes.child_key(self._parent_key(sequence), sequence.tokens[start : start + PAGE_SIZE])

    def reserve(self, sequence: Sequence, slots: int) -> bool:
        """Make the sequence's pages reach ``slots`` logical slots; False (nothing changed) if the pool cannot."""
        missing = pages_for(slots) - len(sequence.pages)
        if missing <= 0:
            return True
        taken = self.prefixes.pool.take(missing)
        if taken is None:
            return False
        sequence.pages.extend(taken)
        return True

    def commit(self, batch: RaggedBatch, nodes: Nodes, verdict: Verdict) -> None:
        """Move the accepted path's K/V behind the chain, in order; the other nodes' slots are simply free again."""
        if verdict.path.shape[1] == 0:
            return
        if self._in_one_call:
            where = batch.slots, batch.wanted, nodes.first, verdict.path
            torch.ops.saccade.keep_paths.default(self.kv.keys, self.kv.values, *where)
            return
        scratch = self.kv.scratch_page * PAGE_SIZE
        moves = self._moves(batch.at_wanted(batch.slots), nodes.first, verdict.path, scratch)
        if moves is not None:
            self.kv.move(*moves)

    def register(self, sequence: Sequence, before: int | None = None) -> None:
        """Offer the sequence's full pages to others, and note how far the drafters' K/V reaches in them.

        Args:
            before: the text ends, and had so many tokens before its last step. A drafter would run those of that step
                in the next one. The page that it so lacks is not offered: who continues the text computes it again,
                where a drafter that needs the target's features would have a gap in all that goes on from there.
        """
        if not self.prefixes.enabled:
            return
        full = sequence.cached // PAGE_SIZE
        if before is not None:
            reached = [self._valid_length(bit, sequence) for bit in self._drafter_bits]
            full = min([full, *(valid // PAGE_SIZE for valid in reached if valid >= before - 1)])
        for page in range(len(sequence.page_keys), full):
            tokens = sequence.tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            key = self.prefixes.child_key(self._parent_key(sequence), tokens)
            sequence.page_keys.append(key)
            self.prefixes.register(sequence.pages[page], key, 0)
        for bit in self._drafter_bits:
            full = min(self._valid_length(bit, sequence) // PAGE_SIZE, len(sequence.page_keys))
            for page in range(sequence.marked_pages.get(bit, 0), full):
                self.prefixes.mark_valid(sequence.pages[page], 1 << bit)
            sequence.marked_pages[bit] = max(full, sequence.marked_pages.get(bit, 0))

    def trim(self, sequence: Sequence) -> None:
        """Return pages beyond the next token's slot."""
        keep = pages_for(sequence.length)
        if len(sequence.pages) > keep:
            self.prefixes.release(sequence.pages[keep:])
            del sequence.pages[keep:]

    def release(self, sequence: Sequence) -> None:
        """Give up all pages; K/V of the sequence starts from nothing."""
        self.prefixes.release(sequence.pages)
        sequence.pages, sequence.page_keys, sequence.cached = [], [], 0
        sequence.marked_pages.clear()

    def _parent_key(self, sequence: Sequence) -> Key:
        """The key that the next page of a sequence hangs on."""
        return sequence.page_keys[-1] if sequence.page_keys else self.prefixes.root_key(sequence.request.cache_salt)

    def disown(self, sequence: Sequence) -> None:
        """What its pages hold is wrong: nobody is to find them."""
        self.prefixes.forget(sequence.pages)
        sequence.page_keys, sequence.cached = [], 0
        sequence.marked_pages.clear()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise PoolError unless every page is accounted for."""
        self.prefixes.pool.check(sequence.pages for sequence in sequences)


def pages_for(slots: int) -> int:
    return -(-slots // PAGE_SIZE)


def scratch_slots(table: Tensor, logical: Tensor) -> Tensor:
    """Slots of logical indices [R, B] by page table [R, P]."""
    page = table.long().gather(1, torch.div(logical, PAGE_SIZE, rounding_mode="floor"))
    return page * PAGE_SIZE + logical % PAGE_SIZE
