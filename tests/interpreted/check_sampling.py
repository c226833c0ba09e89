"""Triton's sampling in its interpreter, float32 against plain PyTorch. tests/unit/test_triton.py runs this file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decoding.noise import as_int64, gumbel
from decoding.sampling_ops import NOT_A_TOKEN, DeviceSamplingOps
from decoding.triton_sampling import PART, TritonSamplingOps

PLAIN, FUSED = DeviceSamplingOps(), TritonSamplingOps()
SEEDS = [0, 1, -1, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF0]


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance of two float32 tensors of equal signs, in units of the last place."""
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max())


@pytest.mark.parametrize("vocab", [1, 11, 1024, 5003])
def test_noise_is_the_definitions(vocab: int) -> None:
    places = [6, 0, 3, 1, 2, 5, 8]
    positions, choices = [0, 1, 131071, 2**31, 77, 5, 9], [0, 127, 1, 0, 3, 2, 0]
    bank = torch.full((9, vocab), -7.0)
    FUSED.fill_noise(bank, places, [as_int64(seed) for seed in SEEDS], positions, choices)
    expected = torch.empty(len(SEEDS), vocab)
    seeds = torch.tensor([as_int64(seed) for seed in SEEDS])
    gumbel(expected, seeds, torch.tensor(positions), torch.tensor(choices))
    made = bank[places]
    assert torch.equal(made.sign(), expected.sign())
    assert ulps(made, expected) <= 2
    assert (bank[[4, 7]] == -7.0).all(), "other vectors of the bank stay as they are"


@pytest.mark.parametrize("vocab", [1, 100, PART, 2 * PART + 5])
def test_draws(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    wide = torch.randn(12, vocab + 9, generator=generator)
    x = wide[:, :vocab]  # as the logits of a vocabulary with padding are
    temperature, noise = 0.2 + torch.rand(12, generator=generator), torch.randn(5, vocab, generator=generator)
    noise_row = torch.tensor([-1, 0, 1, 2, 3, 4, -1, 0, 0, 4, 2, 1])
    x[3] = x[3].round()  # ties
    x[6] = x[6].round()
    x[7] = -torch.inf
    x[7, -1] = 1.0
    assert torch.equal(FUSED.draw(x, temperature, noise, noise_row), PLAIN.draw(x, temperature, noise, noise_row))
    none = torch.full((12,), -1)
    assert torch.equal(FUSED.draw(x, temperature, noise[:0], none), PLAIN.best(x))
    assert torch.equal(FUSED.best(x), PLAIN.best(x))


def test_the_lowest_id_wins_a_tie_across_parts() -> None:
    x = torch.zeros(3, 3 * PART)
    x[0, [PART + 3, 2 * PART]] = 1.0
    x[1, [5, PART]] = 1.0
    assert FUSED.best(x).tolist() == [PART + 3, 5, 0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_rows_without_a_number_have_no_token(number: float) -> None:
    x = torch.zeros(2, PART + 5)
    x[1] = number
    assert FUSED.best(x).tolist() == [0, NOT_A_TOKEN]
    noise, warmth = torch.zeros(1, PART + 5), torch.ones(2)
    assert FUSED.draw(x, warmth, noise, torch.tensor([0, 0])).tolist() == [0, NOT_A_TOKEN]


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    x, noise = torch.randn(9, 3000), torch.randn(2, 3000)
    temperature, noise_row = torch.full((9,), 0.7), torch.tensor([0, 1, -1] * 3)
    together = FUSED.draw(x, temperature, noise, noise_row)
    alone = [FUSED.draw(x[i : i + 1], temperature[i : i + 1], noise, noise_row[i : i + 1]) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_float64_is_drawn_in_float64() -> None:
    x = torch.tensor([[1.0, 1.0 + 2.0**-40]], dtype=torch.float64)
    assert FUSED.best(x).tolist() == [1]
