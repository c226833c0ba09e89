"""Linear layers whose weight is spread over ranks.

A layer that is split by its outputs needs nothing of its own: it is a smaller ``Linear``, and what it makes stays with
its rank. Queries, keys and values, gate and up are split so. What is made of them goes into a layer that is split by
its inputs, whose results are summed over the ranks (Megatron-LM, 1909.08053, section 3): two sums a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layers.linear import Linear, Packing
from models.parallel.ranks import Ranks


class RowParallelLinear(Linear):
    """A rank's columns of the weight, for its part of the inputs; every rank gets the whole result."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, device: torch.device, dtype: torch.dtype, ranks: Ranks
    ) -> None:
        super().__init__(inputs, outputs, bias, device, dtype)
        self._ranks = ranks

    def pack(self, packing: Packing | None = None) -> None:
        """See ``Linear.pack``."""
        if self._ranks.rank:
            self.bias = None  # it is in rank 0's part of the sum
        super().pack(packing)

    def __call__(self, x: Tensor) -> Tensor:
        return self._ranks.all_reduce(super().__call__(x))


class VocabParallelLinear(Linear):
    """A rank's rows of an LM head of ``vocab_size`` rows; rank 0 gets the whole result, the others their part."""

    def __init__(self, inputs: int, vocab_size: int, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> None:
        super().__init__(inputs, len(ranks.share(vocab_size)), False, device, dtype)
        self._vocab_size = vocab_size
        self._ranks = ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self._ranks.gather_columns(super().__call__(x), self._vocab_size)


def row_parallel(
    inputs: int, outputs: int, bias: bool, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> Linear:
    """A ``RowParallelLinear`` where there are several ranks."""
    if ranks.size == 1:
        return Linear(inputs, outputs, bias, device, dtype)
    return RowParallelLinear(inputs, outputs, bias, device, dtype, ranks)


def vocab_parallel(inputs: int, vocab_size: int, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Linear:
    """A ``VocabParallelLinear`` where there are several ranks."""
    if ranks.size == 1:
        return Linear(inputs, vocab_size, False, device, dtype)
    return VocabParallelLinear(inputs, vocab_size, device, dtype, ranks)
