"""All drafters of an engine, addressed as one."""

from __future__ import annotations

import time

from decoding.batcher import Nodes
from decoding.drafters.base import Drafter
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import PAGE_SIZE, RaggedBatch
from models.target import ForwardOutput
from models.tree import Trees


class DrafterTeam:
    """The drafters in the order of their bits. Keeps the time that they take."""

    def __init__(self, drafters: list[Drafter]) -> None:
        self.members = drafters
        self.seconds = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.members)

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(sorted({tap for d in self.members for tap in d.needs.taps}))

    @property
    def kv_bits(self) -> tuple[int, ...]:
        """Bits of the drafters that have K/V of their own."""
        return tuple(bit for bit, d in enumerate(self.members) if d.needs.kv is not None)

    def admit(self, sequence: Sequence, page_flags: list[int]) -> None:
        """A sequence joins; page_flags tell which drafters' K/V its cached pages hold. A run of valid pages counts."""
        for bit, drafter in enumerate(self.members):
            valid = 0
            while valid < len(page_flags) and page_flags[valid] >> bit & 1:
                valid += 1
            drafter.admit(sequence, valid * PAGE_SIZE)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> list[Trees]:
        started = time.perf_counter()
        proposals = [drafter.propose(plan, quota, sampling) for drafter in self.members] if plan.rows else []
        self.seconds += time.perf_counter() - started
        return [trees for trees in proposals if trees is not None]

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        started = time.perf_counter()
        for drafter in self.members:
            drafter.observe(plan, batch, nodes, out, verdict)
        self.seconds += time.perf_counter() - started

    def valid_length(self, bit: int, sequence: Sequence) -> int:
        return self.members[bit].valid_length(sequence)

    def forget(self, sequence: SequenceId) -> None:
        for drafter in self.members:
            drafter.forget(sequence)
