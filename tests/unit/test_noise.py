"""The request's own noise: its bits, its distribution, its independence, and the bank that keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from decoding.noise import NoiseBank, as_int64, fill_rows, gumbel, philox
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence

CPU = torch.device("cpu")
Words = tuple[int, int, int, int]


def one_philox(counter: Words, key: tuple[int, int]) -> tuple[int, ...]:
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))  # type: ignore[arg-type]
    return tuple(int(word) for word in words)


def plain_philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 in Python's integers, written from the paper (Salmon et al., SC 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def noise(vocab: int, seeds: list[int], positions: list[int], choices: list[int]) -> Tensor:
    out = torch.empty(len(seeds), vocab)
    gumbel(out, torch.tensor([as_int64(s) for s in seeds]), torch.tensor(positions), torch.tensor(choices))
    return out


ALL = 2**32 - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter: Words, key: tuple[int, int], expected: str) -> None:
    wanted = tuple(int(word, 16) for word in expected.split())
    assert one_philox(counter, key) == wanted
    assert plain_philox(counter, key) == wanted


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63, 2**64 - 1, -(2**63), 0x123456789ABCDEF0])
@pytest.mark.parametrize(("position", "choice"), [(0, 0), (1, 0), (131071, 127)])
def test_counter_is_token_block_position_choice(seed: int, position: int, choice: int) -> None:
    vocab = 11  # not a multiple of 4
    made = noise(vocab, [seed], [position], [choice])[0]
    bits = seed % 2**64
    for token in range(vocab):
        words = plain_philox((token // 4, position, choice, 0), (bits % 2**32, bits >> 32))
        expected = -math.log(-math.log1p(-(words[token % 4] + 0.5) * 2.0**-32))
        assert float(made[token]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_vector_does_not_depend_on_its_batch_or_the_vocabulary_s_end() -> None:
    alone = noise(50, [5], [9], [1])
    together = noise(53, [4, 5, 5], [9, 9, 10], [1, 1, 1])
    assert torch.equal(alone[0], together[1, :50])


def test_distribution_is_gumbel() -> None:
    count = 400
    made = noise(500, [77] * count, list(range(count)), [0] * count).flatten().double().numpy()
    assert np.isfinite(made).all()
    assert stats.kstest(made, "gumbel_r").pvalue > 1e-3
    assert made.mean() == pytest.approx(np.euler_gamma, abs=5 * math.pi / math.sqrt(6 * made.size))
    assert made.std() == pytest.approx(math.pi / math.sqrt(6), rel=0.01)


@pytest.mark.parametrize(
    ("seed", "position", "choice"),
    [(78, 0, 0), (77 + 2**32, 0, 0), (-77, 0, 0), (77, 1, 0), (77, 16, 0), (77, 0, 1), (77, 0, 2)],
)
def test_other_requests_positions_and_choices_are_uncorrelated(seed: int, position: int, choice: int) -> None:
    rows, vocab = 64, 1000
    positions = list(range(0, 1000 * rows, 1000))
    first = noise(vocab, [77] * rows, positions, [0] * rows).flatten().numpy()
    second = noise(vocab, [seed] * rows, [p + position for p in positions], [choice] * rows).flatten().numpy()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 8, 64])
def test_tokens_are_uncorrelated(shift: int) -> None:
    made = noise(1000, [77] * 64, list(range(64)), [0] * 64).numpy()
    first, second = made[:, :-shift].flatten(), made[:, shift:].flatten()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)


# the bank ------------------------------------------------------------------------------------------------------------

VOCAB = 6
DEEPEST = 3


def a_sequence(number: int, temperature: float = 1.0) -> Sequence:
    request = GenerateRequest(f"r{number}", (1,) * (1 + number % 5), SamplingParams(500, temperature))
    return Sequence(request, number % 3, seed=1000 + number)


def vectors_of(bank: NoiseBank, sequence: Sequence, depth: int) -> Tensor:
    """What the bank holds for the next depth + 1 positions."""
    first = torch.tensor(bank.first_rows([sequence]) * (depth + 1))
    return bank.vectors[first + (sequence.length + torch.arange(depth + 1)) % bank.ring]


def fresh(sequence: Sequence, depth: int) -> Tensor:
    count = depth + 1
    positions = list(range(sequence.length, sequence.length + count))
    return noise(VOCAB, [sequence.seed] * count, positions, [sequence.choice] * count)


@dataclass(frozen=True)
class Turn:
    """One step: which of the sequences take part, how deep, how many tokens each gains; who leaves afterwards."""

    members: frozenset[int]
    depth: int
    gains: tuple[int, ...]
    leaver: int | None


turns = st.builds(
    Turn,
    members=st.frozensets(st.integers(0, 9)),
    depth=st.integers(0, DEEPEST),
    gains=st.tuples(*[st.integers(0, DEEPEST + 1)] * 10),
    leaver=st.one_of(st.none(), st.integers(0, 9)),
)


@given(st.lists(turns, max_size=25))
@settings(max_examples=80, deadline=None)
def test_the_bank_equals_fresh_noise(history: list[Turn]) -> None:
    """Whatever advances by whatever, leaves, and whoever takes its place."""
    bank = NoiseBank(VOCAB, DEEPEST + 2, CPU)
    sequences = {number: a_sequence(number) for number in range(10)}
    newcomers = 10
    for turn in history:
        members = [sequences[number] for number in sorted(turn.members)]
        bank.fill(members, turn.depth)
        for sequence in members:
            assert torch.equal(vectors_of(bank, sequence, turn.depth), fresh(sequence, turn.depth))
        for number in turn.members:
            for _ in range(min(turn.gains[number], turn.depth + 1)):
                sequences[number].append(0)
        if turn.leaver is not None:
            bank.forget(sequences[turn.leaver].id)
            sequences[turn.leaver] = a_sequence(newcomers)
            newcomers += 1


def test_noise_is_made_once() -> None:
    made: list[int] = []

    def counting(bank: Tensor, places: list[int], *keys: list[int]) -> None:
        made.extend(keys[1])
        fill_rows(bank, places, *keys)

    bank, sequence = NoiseBank(VOCAB, DEEPEST + 2, CPU, counting), a_sequence(0)
    for _ in range(10):
        bank.fill([sequence], DEEPEST)
        sequence.append(0)
    assert made == list(range(1, 1 + DEEPEST + 10))


def test_slots_grow_with_the_batch_and_are_reused() -> None:
    bank = NoiseBank(VOCAB, DEEPEST + 2, CPU)
    sequences = [a_sequence(number) for number in range(20)]
    bank.fill(sequences, DEEPEST)
    size = len(bank.vectors)
    assert len(set(bank.first_rows(sequences))) == 20
    for sequence in sequences:
        assert torch.equal(vectors_of(bank, sequence, DEEPEST), fresh(sequence, DEEPEST))
    for round_ in range(1, 10):
        for sequence in sequences:
            bank.forget(sequence.id)
        sequences = [a_sequence(20 * round_ + number) for number in range(20)]
        bank.fill(sequences, 0)
    assert len(bank.vectors) == size


def test_greedy_sequences_have_no_noise() -> None:
    bank, greedy = NoiseBank(VOCAB, DEEPEST + 2, CPU), a_sequence(0, temperature=0.0)
    bank.fill([greedy], DEEPEST)
    assert bank.first_rows([greedy]) == [-1]
    assert len(bank.vectors) == 0
    bank.forget(greedy.id)
