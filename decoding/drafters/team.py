"""All drafters of an engine, addressed as one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from decoding.batcher import Nodes
from decoding.drafters.base import Drafter
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import PAGE_SIZE, RaggedBatch
from models.target import ForwardOutput
from models.transfer import fetch
from models.tree import Trees

logger = logging.getLogger("saccade.engine")


@dataclass(frozen=True)
class Proposal:
    """One drafter's trees of a step's deciding rows."""

    bit: int  # the drafter's number
    trees: Trees  # [R, N]


class DrafterTeam:
    """The drafters in the order of their bits, those that are there by themselves last. Keeps the time that each takes.

    Attributes:
        members: the drafters that the server was asked for; ``names`` are theirs.
        sources: the names of all, by bit.
    """

    def __init__(self, drafters: list[Drafter]) -> None:
        self.members = [d for d in drafters if not d.needs.automatic]
        self.names = tuple(d.name for d in self.members)
        self.sources = tuple(d.name for d in drafters)
        self.want_draws = any(d.needs.draws for d in drafters)
        self._tapping = [(d.name, d.needs.taps) for d in drafters if d.needs.taps]
        self.taken = {drafter.name: 0.0 for drafter in drafters}  # seconds
        self._ranking = [d for d in drafters if d.needs.top]
        self._guessing = [(bit, d) for bit, d in enumerate(drafters) if d.needs.host]
        self._drafting = [(bit, d) for bit, d in enumerate(drafters) if not d.needs.host]
        self._with_kv = [d for d in self.members if d.needs.kv is not None]
        self._doubts: dict[str, Callable[[], list[np.ndarray]]] = {}  # on a device: whether the last trees were broken
        self._broken: set[str] = set()  # drafters of which the log says so

    @property
    def seconds(self) -> float:
        """What all of them took."""
        return sum(self.taken.values())

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

    def taps(self, plan: Plan) -> tuple[int, ...]:
        """The target's hidden states that are wanted of a step: by the drafters that follow any of its rows."""
        wanted: set[int] = set()
        for name, taps in self._tapping:
            if any(name not in row.sequence.unfollowed for row in plan.rows):
                wanted.update(taps)
        return tuple(sorted(wanted))

    def guess(self, plan: Plan, limits: Quota, sampling: Sampling) -> list[Proposal]:
        """Proposals of the drafters that run no model."""
        return self._ask(self._guessing, plan, limits, sampling)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> list[Proposal]:
        """Proposals of the others."""
        return self._ask(self._drafting, plan, quota, sampling)

    def _ask(self, members: list[tuple[int, Drafter]], plan: Plan, quota: Quota, sampling: Sampling) -> list[Proposal]:
        if not quota.nodes:
            return []
        proposals = []
        for bit, drafter in members:
            if not any(drafter.name in row.drafters for row in quota.rows):
                continue
            started = time.perf_counter()
            trees = drafter.propose(plan, quota, sampling)
            if trees is not None and not drafter.needs.host:
                trees = self._sound(drafter.name, trees)
            if trees is not None:
                proposals.append(Proposal(bit, sampling.permitted(trees)))
            self.taken[drafter.name] += time.perf_counter() - started
        return proposals

    def _sound(self, name: str, trees: Trees) -> Trees:
        """A model's trees, in which guesses by logits that are no numbers (a confidence of NaN) are worth nothing.

        On a device the log says so when the drafter is asked again: the host does not wait to know.
        """
        broken = trees.confidence.isnan().any()
        if trees.tokens.device.type == "cpu":
            if not broken:
                return trees
            self._complain(name)
        else:
            before, self._doubts[name] = self._doubts.get(name), fetch(broken)
            if before is not None and before()[0]:
                self._complain(name)
        return replace(trees, confidence=trees.confidence.nan_to_num(0.0))

    def _complain(self, name: str) -> None:
        if name not in self._broken:
            self._broken.add(name)
            logger.warning(
                "%s: the logits of this drafter are no numbers, so what it drafts counts as nothing: texts stay right, "
                "but it only costs time. Its checkpoint is broken, or computes values that its dtype cannot hold",
                name,
            )

    def with_top(self, out: ForwardOutput, logits: Tensor, limits: Quota, sampling: Sampling) -> ForwardOutput:
        """The output with the likeliest tokens of each node, if a drafter wants them that was asked in this step.

        Once for all of them, who share the time it takes.

        Args:
            logits: [W, V'] raw.
            limits: by which the drafters were asked.
        """
        asked = [d for d in self._ranking if any(d.name in row.drafters for row in limits.rows)]
        if not asked:
            return out
        started = time.perf_counter()
        top = sampling.top(logits, max(d.needs.top for d in asked))
        out = ForwardOutput(out.hidden, out.taps, top)
        share = (time.perf_counter() - started) / len(asked)
        for drafter in asked:
            self.taken[drafter.name] += share
        return out

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        for drafter in self.members:
            started = time.perf_counter()
            drafter.observe(plan, batch, nodes, out, verdict)
            self.taken[drafter.name] += time.perf_counter() - started

    def read_prompts(self) -> list[Sequence]:
        """Let drafters run what they put off until a step's tokens were out; the sequences whose K/V they wrote."""
        read: list[Sequence] = []
        for drafter in self._with_kv:
            started = time.perf_counter()
            read += drafter.read_prompts()
            self.taken[drafter.name] += time.perf_counter() - started
        return read

    def valid_length(self, bit: int, sequence: Sequence) -> int:
        return self.members[bit].valid_length(sequence)

    def forget(self, sequence: SequenceId) -> None:
        for drafter in self.members:
            drafter.forget(sequence)

    def close(self) -> None:
        for drafter in self.members:
            drafter.close()
