"""Makes each step's ``Sampling``: the table of parameters is kept as long as the same sequences decide."""

from __future__ import annotations

import numpy as np
import torch

from decoding.noise import NoiseBank
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling, SamplingTable, count, make_table
from decoding.sampling_ops import SamplingOps
from decoding.sequence import Sequence, SequenceId
from models.transfer import upload


class Sampler:
    """Owns the noise and the table.

    Args:
        vocab_size: ids of the tokenizer; the logits of ids beyond are never drawn.
        eos_ids: banned before min_tokens.
    """

    def __init__(
        self, noise: NoiseBank, ops: SamplingOps, vocab_size: int, eos_ids: tuple[int, ...], device: torch.device
    ) -> None:
        self.noise = noise
        self._ops = ops
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._device = device
        self._sequences: list[Sequence] = []  # of the table
        self._table: SamplingTable | None = None
        self._unchanging: Sampling | None = None  # of the table, if it is the same in every step

    def prepare(self, plan: Plan, quota: Quota) -> Sampling:
        """Everything that drafting and verifying this plan's deciding rows need."""
        sequences = [row.sequence for row in plan.deciding]
        if self._table is None or sequences != self._sequences:
            self.noise.fill(sequences, 0)  # gives each its place
            first = self.noise.first_rows(sequences)
            self._table = make_table(sequences, first, self._vocab_size, self._eos_ids, self._device)
            self._sequences = sequences
            self._unchanging = None
        if self._unchanging is None:
            return self._made(self._table, sequences, quota)
        return self._unchanging

    def _made(self, table: SamplingTable, sequences: list[Sequence], quota: Quota) -> Sampling:
        positions = table.first_noise  # not read; no tensor is made for it
        if not table.all_greedy:
            self.noise.fill(sequences, quota.depth)
            [positions] = upload(self._device, np.array([s.length for s in sequences]))
        sampling = Sampling(
            table=table,
            counts=count(sequences, table, self._vocab_size, self._device),
            noise=self.noise,
            next_position=positions,
            vocab_size=self._vocab_size,
            ops=self._ops,
        )
        if table.all_greedy and not table.is_counted:
            self._unchanging = sampling
        return sampling

    def forget(self, sequence: SequenceId) -> None:
        self.noise.forget(sequence)
        self._sequences = []
        self._table = self._unchanging = None
