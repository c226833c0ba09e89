"""Which drafts are made with the noise of the draw, and what the others are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decoding.acceptance import Acceptance
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sequence import Sequence
from tests.steps import ON_CPU, sampling_of

VOCAB, ROWS, K, TAU = 40, 6, 5, 0.7
TYPICAL = Acceptance("typical")
LOGITS = 2 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))
DEPTH = torch.tensor([0, 1, 2, 0, 1, 2])


def a_sequence(seed: int, speculation: SpeculationParams, **params: float) -> Sequence:
    return Sequence(GenerateRequest("r", (1, 2), SamplingParams(**params), speculation), 0, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("speculation", "temperature", "coupled"),
    [
        (SpeculationParams(), 1.0, True),
        (SpeculationParams(coupling=True), 1.0, True),
        (SpeculationParams(coupling=False), 1.0, False),
        (SpeculationParams(), 0.0, False),
        (SpeculationParams(coupling=True), 0.0, False),
        (SpeculationParams(acceptance=TYPICAL), 1.0, False),
        (SpeculationParams(acceptance=TYPICAL, coupling=True), 1.0, True),
    ],
)
def test_drafts_are_coupled_under_the_exact_rule(
    speculation: SpeculationParams, temperature: float, coupled: bool
) -> None:
    assert a_sequence(0, speculation, temperature=temperature).is_coupled == coupled


def guesses(sequences: list[Sequence], ops: str, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sampling = sampling_of(sequences, vocab=VOCAB, ops=ops)
    x = LOGITS if ids is None else LOGITS[:, ids]
    return sampling.guess(x, torch.arange(ROWS), DEPTH, K, TAU, ids)


@pytest.mark.parametrize("drafted", [None, torch.arange(3, VOCAB, 2)], ids=["vocabulary", "draft vocabulary"])
@pytest.mark.parametrize("ops", ON_CPU)
def test_each_row_is_coupled_or_not_by_itself(ops: str, drafted: Tensor | None) -> None:
    wishes = [SpeculationParams(coupling=row % 2 == 0) for row in range(ROWS)]
    warm = [0.4, 0.4, 1.0, 1.0, 1.7, 1.7]
    mixed = guesses([a_sequence(row, wishes[row], temperature=warm[row]) for row in range(ROWS)], ops, drafted)
    coupled = guesses(
        [a_sequence(row, SpeculationParams(), temperature=warm[row]) for row in range(ROWS)], ops, drafted
    )
    x = LOGITS if drafted is None else LOGITS[:, drafted]
    for row in range(ROWS):
        if wishes[row].coupling:
            assert torch.equal(mixed[0][row], coupled[0][row])
            assert torch.equal(mixed[1][row], coupled[1][row])
            continue
        best = x[row].topk(K).indices
        assert torch.equal(mixed[0][row], best if drafted is None else drafted[best])
        expected = (x[row] / torch.tensor(warm[row]) / TAU).softmax(dim=0)[best]
        torch.testing.assert_close(mixed[1][row], expected)
        assert not torch.equal(mixed[0][row], coupled[0][row])


@pytest.mark.parametrize("ops", ON_CPU)
def test_uncoupled_guesses_heed_the_filters(ops: str) -> None:
    sequences = [a_sequence(row, SpeculationParams(coupling=False), temperature=0.8, top_k=2) for row in range(ROWS)]
    ids, confidence = guesses(sequences, ops)
    assert torch.equal(ids[:, :2], LOGITS.topk(2, dim=1).indices)
    assert (confidence[:, :2] > 0).all()
    assert (confidence[:, 2:] == 0).all()


@pytest.mark.parametrize("ops", ON_CPU)
def test_greedy_rows_are_as_they_are_beside_uncoupled_ones(ops: str) -> None:
    greedy = [a_sequence(row, SpeculationParams(), temperature=0.0) for row in range(ROWS)]
    beside = [*greedy[:-1], a_sequence(9, SpeculationParams(coupling=False), temperature=0.5)]
    alone, mixed = guesses(greedy, ops), guesses(beside, ops)
    assert torch.equal(alone[0][:-1], mixed[0][:-1])
    torch.testing.assert_close(alone[1][:-1], mixed[1][:-1], rtol=1e-6, atol=0)
