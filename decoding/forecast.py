"""What a drafter's trees will hold, forecast per row from how its earlier ones fared.

A drafter's *coverage* of depth d is the chance that the text's first d tokens lie in its tree, among nodes probable
enough to be bought. It is kept as chances from depth to depth, for each running sequence and for all of them together;
a sequence begins with those of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.calibration import MODES
from decoding.proposal_ops import CoverageTable, ProposalOps
from decoding.sequence import SequenceId

HOPE = 0.7  # chance from depth to depth before anything is known: a drafter gets its trial
ROW_RATE = 1 / 12  # how fast a row's chances follow what is seen
ALL_RATE = 1 / 64  # and those of all rows
RETURN_RATE = 1 / 16  # of ``drift``: how fast a row goes back to those of all
FIRST_WIDTH = 2.0  # nodes of a depth before anything is known


class Forecast:
    """Coverage by drafter and depth. Everything is on the host.

    Args:
        drafters: how many; they are known by their bits.
        depth: of the deepest tree.
    """

    def __init__(self, drafters: int, depth: int, ops: ProposalOps) -> None:
        self.depth = depth
        self._ops = ops
        hope = torch.full((len(MODES), drafters, depth), HOPE, dtype=torch.float64)
        widths = torch.full((drafters, depth), FIRST_WIDTH, dtype=torch.float64)
        self.table = CoverageTable(hope[:0].clone(), hope, widths)
        self._slot: dict[SequenceId, int] = {}
        self._free: list[int] = []

    def join(self, sequence: SequenceId, mode: int) -> int:
        """The slot of a sequence; one that is not known gets the chances of all."""
        slot = self._slot.get(sequence)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slot[sequence] = self._free.pop()
            self.table.chances[slot] = self.table.common[mode]
        return slot

    def slot(self, sequence: SequenceId) -> int:
        """Where the chances of a sequence are; -1 for one that is not known any more."""
        return self._slot.get(sequence, -1)

    def forget(self, sequence: SequenceId) -> None:
        if sequence in self._slot:
            self._free.append(self._slot.pop(sequence))

    def drift(self, slots: Tensor, modes: Tensor) -> None:
        """Some steps have passed: rows that a drafter does not draft for become a little like the others."""
        chances, common = self.table.chances, self.table.common
        chances[slots] += RETURN_RATE * (common[modes] - chances[slots])

    def _grow(self) -> None:
        old = self.table.chances
        count = len(old)
        grown = old.new_full((max(8, 2 * count), *old.shape[1:]), HOPE)
        grown[:count] = old
        self.table = CoverageTable(grown, self.table.common, self.table.widths)
        self._free = list(range(len(grown) - 1, count - 1, -1))
