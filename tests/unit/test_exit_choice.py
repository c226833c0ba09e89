"""Which exit is chosen, by what it promises."""

from __future__ import annotations

import pytest
import torch

from decoding.drafters.exit_choice import ExitChoice, candidates, measure_exits, promise, score_exit
from models.decoder import Decoder
from tests.engines import VOCAB, tiny_decoder


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 12, 32, 80])
def test_candidates_are_early_exits(layers: int) -> None:
    found = candidates(layers)
    assert found == sorted(set(found))
    assert len(found) <= 12
    assert all(1 <= layer < layers for layer in found)
    assert bool(found) == (layers > 1)


def test_the_promise_is_that_of_the_theorem() -> None:
    for agreement in (0.0, 0.3, 0.9):
        for cost in (0.1, 0.5):
            for depth in (1, 4):
                expected = (1 - agreement ** (depth + 1)) / ((1 - agreement) * (depth * cost + 1))
                assert promise(agreement, cost, depth) == pytest.approx(expected)
    assert promise(1.0, 0.25, 4) == pytest.approx(5 / 2)


def test_a_better_guess_is_worth_longer_chains() -> None:
    target = tiny_decoder(torch.float64, layers=8)
    scores = [score_exit(target, 2, agreement, 6) for agreement in (0.05, 0.6, 0.95)]
    assert [score.depth for score in scores] == sorted(score.depth for score in scores)
    assert scores[0].depth == 1
    assert scores[-1].depth > 2
    assert scores[0].speed < 1 < scores[-1].speed
    costs = [score_exit(target, layer, 0.5, 6).cost for layer in range(1, 9)]
    assert costs == sorted(costs)
    assert costs[-1] == 1


def idle_after(layers: int, total: int) -> Decoder:
    """A decoder whose later layers add nothing to the residual stream."""
    target = tiny_decoder(torch.float64, layers=total)
    for name, weight in target.weights().items():
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) >= layers and parts[2] in ("o", "down"):
            weight.zero_()
    return target


@pytest.mark.parametrize("layers", [1, 3])
def test_the_earliest_exit_that_says_it_all_is_chosen(layers: int) -> None:
    target = idle_after(layers, 6)
    choice = measure_exits(target, VOCAB, None, 6)
    assert choice.best.layer == layers
    assert choice.best.agreement == 1
    assert all(score.agreement == 1 for score in choice.scores if score.layer >= layers)
    assert all(score.agreement < 0.9 for score in choice.scores if score.layer < layers)
    assert f"first {layers} of 6 layers" in choice.summary()
    assert choice.table().count("<- chosen") == 1


def test_it_is_the_same_every_time() -> None:
    choices: list[ExitChoice] = [measure_exits(tiny_decoder(torch.float32, layers=4), VOCAB, 5, 6) for _ in range(2)]
    assert choices[0] == choices[1]


def test_a_short_context_is_enough() -> None:
    target = tiny_decoder(torch.float64, layers=2)
    target.max_model_len = 1
    assert measure_exits(target, VOCAB, 5, 6).tokens == 8
