"""The request's own randomness: Gumbel noise as a pure function of (seed, position, token id, choice).

Bits are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), equal on every device:
key = seed mod 2^64, counter = (token id / 4, position of the drawn token, choice, 0), output word token id mod 4. From
the 32 bits b comes g = -log(-log1p(-(b + 1/2) / 2^32)), computed in float64 and rounded to float32.
argmax(logits / T + g) is then an exact draw from softmax(logits / T) (the Gumbel-max trick).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.sequence import Sequence, SequenceId
from models.transfer import upload

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of the two multiplications in a Philox4x32 round
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
ROUNDS = 10
LOW = 0xFFFFFFFF


class NoiseKernel(Protocol):
    """Fills the rows ``places`` [M] of ``bank`` [N, V] float32 from seeds (as int64), positions and choices [M]."""

    def __call__(
        self, bank: Tensor, places: list[int], seeds: list[int], positions: list[int], choices: list[int]
    ) -> None: ...


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors (broadcastable) holding 32-bit words in, four words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; the int64 product wraps, its bits are right."""
    product = x * constant
    return (product >> 32) & LOW, product & LOW


def fill_rows(bank: Tensor, places: list[int], seeds: list[int], positions: list[int], choices: list[int]) -> None:
    """The reference NoiseKernel, in PyTorch on any device."""
    [index] = upload(bank.device, np.array([places, seeds, positions, choices]))
    made = bank.new_empty(len(places), bank.shape[1])
    gumbel(made, index[1], index[2], index[3])
    bank[index[0]] = made


def gumbel(out: Tensor, seeds: Tensor, positions: Tensor, choices: Tensor) -> None:
    """Fill ``out`` [M, V] float32 from seeds, positions and choices [M] int64."""
    vocab = out.shape[1]
    block = torch.arange((vocab + 3) // 4, device=out.device)
    key = (seeds[:, None] & LOW, (seeds[:, None] >> 32) & LOW)
    counter = (block[None], positions[:, None] & LOW, choices[:, None] & LOW, torch.zeros_like(block)[None])
    shape = (len(seeds), len(block))
    words = torch.stack([word.expand(shape) for word in philox(counter, key)], dim=-1).flatten(1)[:, :vocab]
    uniform = (words.double() + 0.5) * 2.0**-32
    out.copy_(-torch.log(-torch.log1p(-uniform)))


def as_int64(seed: int) -> int:
    """The int64 with the bits of seed mod 2^64."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


class NoiseBank:
    """Noise vectors of the sampled (not greedy) sequences, one per position, shared by target and drafters.

    A sequence owns ``ring`` vectors; the one of position t lies at t mod ring, so that a vector made for a draft of
    this step serves the next steps too. Greedy sequences need none.

    Args:
        vocab_size: length of a vector.
        ring: positions kept per sequence: deepest tree + 2.
        kernel: fills the vectors.
    """

    def __init__(self, vocab_size: int, ring: int, device: torch.device, kernel: NoiseKernel = fill_rows) -> None:
        self.ring = ring
        self._kernel = kernel
        self._device = device
        self.vectors = torch.zeros(0, vocab_size, device=device)  # [slots * ring, V] float32
        self._free_slots: list[int] = []
        self._slot: dict[SequenceId, int] = {}
        self._held: dict[SequenceId, tuple[int, int]] = {}  # first and last + 1 of the positions that are in the ring

    def fill(self, sequences: list[Sequence], depth: int) -> None:
        """Make the noise of the next ``depth`` + 1 positions of each sampled sequence."""
        places: list[int] = []
        seeds: list[int] = []
        positions: list[int] = []
        choices: list[int] = []
        for sequence in sequences:
            if sequence.is_greedy:
                continue
            first = self._slot_of(sequence.id) * self.ring
            for position in self._missing(sequence, depth):
                places.append(first + position % self.ring)
                seeds.append(as_int64(sequence.seed))
                positions.append(position)
                choices.append(sequence.choice)
        if places:
            self._kernel(self.vectors, places, seeds, positions, choices)

    def _missing(self, sequence: Sequence, depth: int) -> list[int]:
        """The wanted positions whose vectors are not in the ring; from now on they are."""
        start, stop = sequence.length, sequence.length + depth + 1
        low, high = self._held[sequence.id]
        last = max(stop, high) if high > start else stop
        self._held[sequence.id] = max(start, last - self.ring), last
        return [position for position in range(start, stop) if not low <= position < high]

    def first_rows(self, sequences: list[Sequence]) -> list[int]:
        """First row of each sequence's ring in ``vectors``; -1 for greedy ones."""
        return [-1 if s.is_greedy else self._slot[s.id] * self.ring for s in sequences]

    def forget(self, sequence: SequenceId) -> None:
        if sequence in self._slot:
            self._free_slots.append(self._slot.pop(sequence))
            del self._held[sequence]

    def _slot_of(self, sequence: SequenceId) -> int:
        if sequence not in self._slot:
            if not self._free_slots:
                count = len(self._slot)
                grown = max(4, 2 * count)
                more = torch.zeros((grown - count) * self.ring, self.vectors.shape[1], device=self._device)
                self.vectors = torch.cat([self.vectors, more])
                self._free_slots = list(range(grown - 1, count - 1, -1))
            self._slot[sequence] = self._free_slots.pop()
            self._held[sequence] = (0, 0)
        return self._slot[sequence]
