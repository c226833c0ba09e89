"""The vocabulary-wide operations of sampling on CUDA, in Triton (models/kernels/triton/sampling.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decoding.sampling_ops import DeviceSamplingOps
from models.kernels.triton import sampling as kernels
from models.transfer import upload

WORDS = 256  # counters of one program, four ids each
PART = 2048  # ids of a row that one program looks at: a vocabulary of 128k fills half of a large device by itself


class TritonSamplingOps(DeviceSamplingOps):
    """``SamplingOps``, fused for float32 logits; nothing waits for the device."""

    def fill_noise(
        self, bank: Tensor, places: list[int], seeds: list[int], positions: list[int], choices: list[int]
    ) -> None:
        """See ``NoiseKernel``."""
        vocab = bank.shape[1]
        [index] = upload(bank.device, np.array([places, seeds, positions, choices], dtype=np.int64))
        grid = (len(places), -(-vocab // (4 * WORDS)))
        kernels.fill_noise[grid](bank, index, vocab, WORDS=WORDS, num_warps=4, enable_fp_fusion=True)

    def best(self, x: Tensor) -> Tensor:
        """See ``SamplingOps``."""
        none = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        return self._best(x, x[:, 0], x[:0], none)

    def draw(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor) -> Tensor:
        """See ``SamplingOps``."""
        return self._best(x, temperature, noise, noise_row)

    def _best(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor) -> Tensor:
        """``draw``; where no row has noise, ``temperature`` and ``noise`` are not read."""
        if x.dtype != torch.float32:
            return super().draw(x, temperature, noise, noise_row)
        x = x if x.stride(1) == 1 else x.contiguous()
        rows, vocab = x.shape
        parts = -(-vocab // PART)
        values = x.new_empty(rows, parts, dtype=torch.float32)
        ids, out = values.new_empty(rows, parts, dtype=torch.int32), values.new_empty(rows, dtype=torch.int64)
        kernels.best_of_part[rows, parts](
            x,
            temperature,
            noise,
            noise_row,
            values,
            ids,
            vocab,
            x.stride(0),
            BLOCK=PART,
            num_warps=4,
            enable_fp_fusion=True,
        )
        wide = 1 << max(0, parts - 1).bit_length()
        kernels.best_of_parts[(rows,)](values, ids, out, parts, BLOCK=wide, num_warps=4, enable_fp_fusion=True)
        return out
