"""Proposals that wait for the text to come out, so that they can be held against it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding.calibration import Calibration
from decoding.drafters.team import Proposal
from decoding.forecast import Forecast
from decoding.plan import Plan
from decoding.proposal_ops import Judged
from models.tree import Trees


@dataclass
class _Record:
    """The proposals of one step, on the host (or on their way to it)."""

    plan: Plan
    lengths: list[int]  # of the texts when it was made
    modes: Tensor  # [R]
    proposals: list[tuple[int, Trees, Tensor]] = field(default_factory=list)  # bit, as made, calibrated confidences
    age: int = 0


class History:
    """Judges each step's proposals as soon as the texts are as long as they may be deep.

    Proposals of a device travel to the host while the next steps run: nobody waits for them.
    """

    def __init__(self, calibration: Calibration, forecast: Forecast) -> None:
        self._calibration = calibration
        self._forecast = forecast
        self._records: deque[_Record] = deque()

    def add(self, plan: Plan, modes: Tensor, proposal: Proposal, calibrated: Trees) -> None:
        """Remember a proposal of the step ``plan`` as it was made, and its calibrated confidences."""
        if not self._records or self._records[-1].plan is not plan:
            lengths = [row.sequence.length for row in plan.deciding]
            self._records.append(_Record(plan, lengths, modes))
        trees = proposal.trees
        made = Trees(*(_to_host(part) for part in (trees.tokens, trees.parents, trees.confidence, trees.source)))
        self._records[-1].proposals.append((proposal.bit, made, _to_host(calibrated.confidence)))

    def settle(self, floor: float) -> None:
        """A step is over: judge what can be judged. ``floor``: see ``ProposalOps.score``."""
        for record in self._records:
            record.age += 1
        while self._records and self._is_ready(self._records[0]):
            self._judge(self._records.popleft(), floor)

    def _is_ready(self, record: _Record) -> bool:
        depth = self._forecast.depth
        if record.age >= depth:  # each step adds a token to every row that goes on
            return True
        pairs = zip(record.plan.deciding, record.lengths, strict=True)
        return all(row.sequence.length - length >= depth or self._ended(row.sequence.id) for row, length in pairs)

    def _ended(self, sequence: tuple[str, int]) -> bool:
        return self._forecast.slot(sequence) < 0

    def _judge(self, record: _Record, floor: float) -> None:
        rows = record.plan.deciding
        text = torch.full((len(rows), self._forecast.depth), -1, dtype=torch.int64)
        known = []
        for number, (row, length) in enumerate(zip(rows, record.lengths, strict=True)):
            came = row.sequence.tokens[length : length + self._forecast.depth]
            text[number, : len(came)] = torch.from_numpy(came)
            known.append(len(came))
        slots = torch.tensor([self._forecast.slot(row.sequence.id) for row in rows])
        there = torch.tensor(known)
        for bit, trees, calibrated in record.proposals:
            scores = self._calibration.learn(bit, trees, calibrated, text, record.modes, floor)
            asked = torch.minimum(scores.extent, there)
            self._forecast.learn(bit, Judged(slots, record.modes, asked, scores.reach, scores.widths))


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
