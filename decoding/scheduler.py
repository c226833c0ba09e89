"""Which sequences run in a step: admission, the token budget, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from decoding.cache import SequenceCache, pages_for
from decoding.plan import Plan, PlannedRow
from decoding.prefix_cache import Key, shareable_tokens
from decoding.sequence import Sequence, SequenceId

WATERMARK = 0.01  # share of the pool kept free at admission, so that the newcomer is not preempted at once


@dataclass
class _Blocked:
    """The first of the queue, for which there was no room."""

    sequence: SequenceId
    lacking: Key | None  # of the first full page of its text that was not found; None: it has no more
    available: int  # pages: the fewest that there have been since


class Scheduler:
    """A queue and a batch. Owns the order of sequences, not their tokens and not their pages.

    Args:
        max_num_seqs: rows of a step; there are never more than ``max_step_tokens``.
        on_admit: told of a sequence that joins the batch and the drafter flags of its cached pages.
        on_preempt: told of a sequence that lost its pages.
    """

    def __init__(
        self,
        cache: SequenceCache,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        num_pages: int,
        on_admit: Callable[[Sequence, list[int]], None],
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        self._cache = cache
        self._max_num_seqs = min(max_num_seqs, max_step_tokens)  # a row that draws needs a query token of every step
        self._max_step_tokens = max_step_tokens
        self._watermark = max(1, int(WATERMARK * num_pages))
        self._on_admit = on_admit
        self._on_preempt = on_preempt
        self.running: list[Sequence] = []  # oldest first
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._blocked: _Blocked | None = None

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.release(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> Plan:
        """The rows of the next step. Reserves their chains' slots; preempts the youngest when pages run out."""
        if self.waiting:
            self._admit()
        budget, preemptions = self._max_step_tokens, self.preemptions
        deciding: list[PlannedRow] = []
        others: list[PlannedRow] = []
        for sequence in self._by_urgency():
            start = sequence.cached
            left = sequence.length - start
            length = min(left, budget)
            if length == 0 or sequence not in self.running or not self._make_room(sequence, start + length):
                continue
            (deciding if length == left else others).append(PlannedRow(sequence, start, length))
            budget -= length
        if self.preemptions != preemptions:
            # (admission reserves all that a prompt needs, so only younger rows give way today, and those come later)
            deciding, others = ([row for row in rows if row.sequence in self.running] for rows in (deciding, others))
        return Plan((*deciding, *others), tuple(deciding))

    def join(self, plan: Plan, nodes: int) -> Plan:
        """The plan with those who came since it was made, as far as they fit beside it and its drafted nodes.

        Its rows stay as they are, in their order, and nobody is preempted.
        """
        budget, known = self._max_step_tokens - plan.chain_tokens - nodes, len(self.running)
        if not self.waiting or budget <= 0:
            return plan
        self._admit()
        deciding: list[PlannedRow] = []
        others: list[PlannedRow] = []
        for sequence in self.running[known:]:  # admission has reserved the slots of their prompts
            row = PlannedRow(sequence, sequence.cached, min(sequence.length - sequence.cached, budget))
            if row.length:
                (deciding if row.decides else others).append(row)
                budget -= row.length
        first, rest = plan.deciding, plan.rows[len(plan.deciding) :]
        return Plan((*first, *deciding, *rest, *others), (*first, *deciding)) if deciding or others else plan

    def _by_urgency(self) -> list[Sequence]:
        """Rows that draw tokens come before chunks of long prompts: a prompt must not stall the others' streams."""
        prompts = [s for s in self.running if s.length - s.cached > 1]
        if not prompts:
            return list(self.running)
        return [s for s in self.running if s.length - s.cached <= 1] + prompts

    def _make_room(self, sequence: Sequence, slots: int) -> bool:
        """Reserve, if need be at the cost of younger sequences; False if this one itself had to give way."""
        while not self._cache.reserve(sequence, slots):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.set_back(sequence)
        self.preemptions += 1

    def set_back(self, sequence: Sequence) -> None:
        """Let a running sequence wait, first in the queue. It loses its pages."""
        self.running.remove(sequence)
        self._cache.release(sequence)
        self._on_preempt(sequence)
        self.waiting.appendleft(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self._next_waiting()
            if sequence is None or self._is_still_blocked(sequence):
                return
            flags = self._cache.admit(sequence)
            need = pages_for(sequence.length) - len(sequence.pages)
            kept = self._watermark if self.running else 0
            if need + kept > self._cache.num_available or not self._cache.reserve(sequence, sequence.length):
                lacking = self._cache.next_key(sequence)
                self._cache.release(sequence)
                self._blocked = _Blocked(sequence.id, lacking, self._cache.num_available)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._on_admit(sequence, flags)

    def _is_still_blocked(self, sequence: Sequence) -> bool:
        """Whether it found no room, and nothing has happened since that could help.

        That is: no page came free, none was added to what is cached of its text, and others run. To look its text up in
        every step would cost a hash a page.
        """
        blocked = self._blocked
        if blocked is None or blocked.sequence != sequence.id or not self.running:
            return False
        available = self._cache.num_available
        if available > blocked.available or self._cache.prefixes.has(blocked.lacking):
            return False
        blocked.available = available
        return True

    def _next_waiting(self) -> Sequence | None:
        """The first in the queue that need not wait for its grammar, nor for a sibling.

        Choices of one request share their prompt: the others follow once the first has its full pages in the prefix
        cache.
        """
        if not self._cache.prefixes.enabled:
            return next((s for s in self.waiting if s.is_ready), None)
        computing = {s.id[0] for s in self.running if s.cached < shareable_tokens(s.prompt_len) and not s.started}
        return next((s for s in self.waiting if s.is_ready and s.id[0] not in computing), None)
