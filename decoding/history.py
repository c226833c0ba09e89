"""Proposals that wait for the text to come out, so that they can be held against it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from decoding.calibration import Calibration
from decoding.drafters.team import Proposal
from decoding.forecast import ALL_RATE, ROW_RATE, Forecast
from decoding.plan import Plan
from decoding.proposal_ops import Judged, ProposalOps
from models import kernels
from models.tree import Trees

BATCH = 4  # steps between two looks at what can be judged


@dataclass
class Record:
    """The proposals of one step, on the host (or on their way to it)."""

    plan: Plan
    lengths: list[int]  # of the texts when it was made
    modes: Tensor  # [R]
    number: int  # of the step
    bits: list[int] = field(default_factory=list)
    made: list[Trees] = field(default_factory=list)
    calibrated: list[Tensor] = field(default_factory=list)  # [R, N] confidences

    def slots(self, forecast: Forecast) -> list[int]:
        """[R] of the forecast; -1 for sequences that have ended."""
        return [forecast.slot(row.sequence.id) for row in self.plan.deciding]


Judge = Callable[[Record, Calibration, Forecast, float], None]
"""Hold a record's proposals against the texts, for the calibration and the forecast; above a floor of probability."""


class History:
    """Judges each step's proposals when the texts are as long as they may be deep.

    Proposals of a device travel to the host while the next steps run: nobody waits for them.
    """

    def __init__(self, calibration: Calibration, forecast: Forecast) -> None:
        self._calibration = calibration
        self._forecast = forecast
        self._judge: Judge = judge_fused if kernels.load() else judge_anywhere
        self._records: deque[Record] = deque()
        self._settled = 0

    def add(self, plan: Plan, number: int, modes: Tensor, proposal: Proposal, calibrated: Trees) -> None:
        """Remember a proposal of the step ``plan``, by its number, as it was made, and its calibrated confidences."""
        if not self._records or self._records[-1].plan is not plan:
            lengths = [row.sequence.length for row in plan.deciding]
            self._records.append(Record(plan, lengths, modes, number))
        record = self._records[-1]
        record.bits.append(proposal.bit)
        trees = proposal.trees
        tokens, parents, confidence = (_to_host(part) for part in (trees.tokens, trees.parents, trees.confidence))
        record.made.append(
            replace(trees, tokens=tokens, parents=parents, confidence=confidence)
        )  # nobody reads sources
        record.calibrated.append(_to_host(calibrated.confidence))

    def settle(self, floor: float, number: int) -> None:
        """A step is over: now and then, judge what can be judged. ``floor``: see ``ProposalOps.score``."""
        if number - self._settled < BATCH:
            return
        self._settled = number
        while self._records and self._is_ready(self._records[0], number):
            record = self._records.popleft()
            self._judge(record, self._calibration, self._forecast, floor)
            for bit in record.bits:
                self._calibration.saw(bit, len(record.lengths))

    def _is_ready(self, record: Record, number: int) -> bool:
        """Each step adds a token at least to every row that goes on."""
        return number - record.number >= self._forecast.depth


def judge_anywhere(
    record: Record, calibration: Calibration, forecast: Forecast, floor: float, ops: ProposalOps | None = None
) -> None:
    """The judge by ``ProposalOps``: what it means."""
    depth = forecast.depth
    text, known = torch.full((len(record.lengths), depth), -1, dtype=torch.int64), []
    for number, (row, length) in enumerate(zip(record.plan.deciding, record.lengths, strict=True)):
        came = row.sequence.tokens[length : length + depth]
        text[number, : len(came)] = torch.from_numpy(came)
        known.append(len(came))
    slots, there, ops = torch.tensor(record.slots(forecast)), torch.tensor(known), ops or calibration.ops
    for bit, trees, calibrated in zip(record.bits, record.made, record.calibrated, strict=True):
        scores = ops.score(trees, calibrated, text, record.modes, floor, calibration.tally(bit))
        judged = Judged(slots, record.modes, torch.minimum(scores.extent, there), scores.reach, scores.widths)
        ops.learn_coverage(forecast.table, bit, judged, ROW_RATE, ALL_RATE)


def judge_fused(record: Record, calibration: Calibration, forecast: Forecast, floor: float) -> None:
    """``judge_anywhere`` in one call: see models/kernels/planning.cpp."""
    tallies = [calibration.tally(bit) for bit in record.bits]
    table = forecast.table
    torch.ops.saccade.judge_proposals.default(
        [torch.from_numpy(row.sequence.tokens) for row in record.plan.deciding],
        record.lengths,
        record.modes,
        record.slots(forecast),
        [trees.tokens for trees in record.made],
        [trees.parents for trees in record.made],
        [trees.confidence for trees in record.made],
        record.calibrated,
        floor,
        record.bits,
        [tally.hits for tally in tallies],
        [tally.trials for tally in tallies],
        [tally.surprise for tally in tallies],
        *(table.chances, table.common, table.widths),
        *(ROW_RATE, ALL_RATE),
    )


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
