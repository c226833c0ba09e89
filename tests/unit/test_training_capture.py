"""What training sees of a target is what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.tiny import SHAPE, load_reference, save_tiny
from tests.parity.zoo import make, save, special
from training.capture import FrozenTarget
from training.errors import TrainError

CPU = torch.device("cpu")
ROWS, LENGTH, TAPS = 3, 37, (0, 1)  # no multiple of a page


def tokens(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path) -> FrozenTarget:
    return FrozenTarget.load(folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3-sliding", "gpt2"])
def test_hidden_states_taps_and_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = save(make("gpt2"), tmp_path) if kind == "gpt2" else save_tiny(kind, tmp_path)
    target, reference = load(folder), load_reference(folder)
    # shapes change between batches, and a batch of the same shape finds the K/V of the one before
    for windows in (tokens(0), tokens(1), tokens(2, rows=2, length=20)):
        captured = target.capture(windows, TAPS)
        with torch.no_grad():
            wanted = reference(windows, output_hidden_states=True)
        torch.testing.assert_close(captured.hidden, wanted.hidden_states[-1], rtol=1e-3, atol=1e-4)
        for tap in TAPS:
            torch.testing.assert_close(captured.taps[tap], wanted.hidden_states[tap], rtol=1e-3, atol=1e-4)
        logits = target.logits(captured.hidden.flatten(0, 1))
        torch.testing.assert_close(logits, wanted.logits.flatten(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "llama-tied-biased", "gpt2"])
def test_embedding_and_head_are_the_checkpoints(kind: str, tmp_path: Path) -> None:
    folder = save(make("gpt2"), tmp_path) if kind == "gpt2" else save_tiny(kind, tmp_path)
    target, reference = load(folder), load_reference(folder)
    assert torch.equal(target.embedding(), reference.get_input_embeddings().weight)
    assert torch.equal(target.head(), reference.get_output_embeddings().weight)
    assert not target.head().requires_grad


def test_captured_states_can_be_trained_on(tmp_path: Path) -> None:
    target = load(save_tiny("llama", tmp_path))
    weight = torch.ones(SHAPE["hidden_size"], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        captured = target.capture(tokens())
        (captured.hidden * weight).square().sum().backward()
    assert captured.hidden.dtype == torch.float32, "the target keeps its own precision under autocast"
    assert weight.grad is not None


@pytest.mark.parametrize("kind", ["gemma2", "phi"])
def test_logits_that_are_not_the_heads_product_are_refused(kind: str, tmp_path: Path) -> None:
    target = load(save(make(kind) if kind == "gemma2" else special(kind), tmp_path))
    with pytest.raises(TrainError, match="caps or shifts"):
        target.head()


def test_what_cannot_be_captured_says_so(tmp_path: Path) -> None:
    target = load(save_tiny("llama", tmp_path / "model", max_position_embeddings=32))
    with pytest.raises(TrainError, match="lower --window"):
        target.capture(tokens(length=33))
    with pytest.raises(TrainError, match=r"no tap 2: the target has layers 0 \.\. 1"):
        target.capture(tokens(length=8), (0, 2))
    with pytest.raises(TrainError, match="cannot be loaded"):
        load(tmp_path)
