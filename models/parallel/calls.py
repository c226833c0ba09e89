"""What rank 0 tells the other ranks: a call, a few numbers and the tensors that it is made with.

A message is a block of fixed size that goes from host to host; on a CPU it has the tensors in it where they fit. Larger
ones, and all that lie on a device, follow in one packed copy. There is nothing in it but numbers: receiving cannot run
code (CVE-2025-32444 was a pickle).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from models.batch import RaggedBatch
from models.parallel.ranks import ANSWER, Ranks
from models.transfer import Kind, layout_of, pack

HEADER = 16  # numbers: the call, and what it needs
MESSAGE = 512  # numbers, the header's and those that have room for tensors


class Call(IntEnum):
    """What can be asked for, each with its numbers and tensors."""

    STOP = 0  # nothing
    LOAD = 1  # model, bytes: JSON [bytes] uint8; answered by Ranks.tell
    FREE = 2  # nothing; answered by Ranks.tell
    CACHE = 3  # cache, model, pages
    DROP = 4  # cache
    FORWARD = 5  # model, cache, layers (0: all, and nothing else than a forward), sizes of a batch; the batch
    LOGITS = 6  # model, rows; hidden states
    MOVE = 7  # cache, slots; sources and targets


class BatchSizes(NamedTuple):
    """What of a batch is no tensor."""

    tokens: int
    rows: int
    pages: int  # columns of the page table
    max_query: int
    max_keys: int

    @staticmethod
    def of(batch: RaggedBatch) -> BatchSizes:
        return BatchSizes(batch.num_tokens, batch.num_rows, batch.page_table.shape[1], batch.max_query, batch.max_keys)

    def kinds(self) -> list[Kind]:
        """Of the tensors of ``batch_tensors``."""
        by_token = [torch.int64, torch.int64, torch.int64, torch.int32, torch.int64, torch.int32]
        kinds: list[Kind] = [((self.tokens,), dtype) for dtype in by_token]
        rows = (self.rows + 1,), (self.rows,), (self.rows, self.pages)
        return kinds + [(shape, torch.int32) for shape in rows]

    def batch(self, tensors: Sequence[Tensor]) -> RaggedBatch:
        """A batch of these tensors; whose logits are asked for matters to rank 0 alone."""
        token_ids, positions, slots, visible, mask, row_of, starts, base, table = tensors
        by_token = token_ids, positions, slots, visible, mask, row_of
        return RaggedBatch(*by_token, starts, base, table, token_ids.new_empty(0), self.max_query, self.max_keys)


def batch_tensors(batch: RaggedBatch) -> list[Tensor]:
    """The tensors of a batch that a forward pass reads, in the order of its fields."""
    by_token = [batch.token_ids, batch.positions, batch.slots, batch.visible, batch.tree_mask, batch.row_of]
    return [*by_token, batch.row_starts, batch.tree_base, batch.page_table]


class Line:
    """One rank's end of the line between rank 0 and the others.

    Args:
        device: where the model and its tensors are.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._message = torch.zeros(MESSAGE, dtype=torch.int64)
        self._numbers = self._message.numpy()  # the same memory
        self._room = self._message[HEADER:].view(torch.uint8)

    def send(
        self,
        call: Call,
        numbers: Sequence[int] = (),
        tensors: Sequence[Tensor] = (),
        timeout: timedelta = ANSWER,
    ) -> None:
        """Rank 0: tell the others.

        Args:
            timeout: in which they must be ready for it.

        Raises:
            RankError: one of them is gone.
        """
        parts, total = layout_of((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        self._numbers[0] = call
        self._numbers[1 : 1 + len(numbers)] = numbers
        if self._fits(total):
            if total:
                pack(list(tensors), parts, self._room)
            self._ranks.call(self._message, timeout)
            return
        self._ranks.call(self._message, timeout)
        packed = torch.empty(total, dtype=torch.uint8, device=self._device)
        pack(list(tensors), parts, packed)
        self._ranks.broadcast(packed)

    def receive(self) -> tuple[Call, list[int]]:
        """Another rank: wait for a call; its numbers, and zeros behind them.

        Raises:
            RankError: rank 0 is gone.
        """
        self._ranks.call(self._message)
        call, *numbers = self._numbers[:HEADER].tolist()
        return Call(call), numbers

    def tensors(self, kinds: Sequence[Kind]) -> list[Tensor]:
        """The tensors of the call just received, valid until the next one.

        Raises:
            RankError: rank 0 is gone.
        """
        parts, total = layout_of(kinds)
        packed = self._room
        if not self._fits(total):
            packed = torch.empty(total, dtype=torch.uint8, device=self._device)
            self._ranks.broadcast(packed)
        return [part.of(packed) for part in parts]

    def _fits(self, size: int) -> bool:
        return not size or (self._device.type == "cpu" and size <= self._room.shape[0])
