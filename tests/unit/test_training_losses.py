"""The chunked losses equal the formulas, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.heads import Depth, Teacher, depth_losses
from training.recipe import Windows

B, S, H, V, D = 3, 14, 8, 20, 3
OFFSETS = (2, 3, 4)
WEIGHTS = (1.0, 0.8, 0.64)


def windows() -> Windows:
    generator = torch.Generator().manual_seed(1)
    counts = torch.rand(B, S, generator=generator) < 0.7
    counts[:, :2] = True  # labels that no depth, and only the first, can reach
    return Windows(torch.randint(0, V, (B, S), generator=generator), counts)


def parameters(shared: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(B, S, H, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(D)]
    made = [torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(D)]
    return hidden, [made[0]] * D if shared else made


def teacher() -> Teacher:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    return Teacher(torch.randn(B, S, H, generator=generator, dtype=torch.float64), lambda hidden: hidden @ head.T)


def straightforward(
    batch: Windows, hidden: list[Tensor], matrices: list[Tensor], guide: Teacher | None
) -> tuple[Tensor, list[Tensor], list[float]]:
    """The definition, label by label: (total, loss of each depth, accuracy of each depth)."""
    losses, accuracies = [], []
    for states, head, offset in zip(hidden, matrices, OFFSETS, strict=True):
        each, hits = [], []
        for row in range(B):
            for place in range(offset, S):
                if not batch.counts[row, place]:
                    continue
                logits, label = head @ states[row, place - offset], int(batch.tokens[row, place])
                if guide is None:
                    each.append(F.cross_entropy(logits[None], torch.tensor([label])))
                else:
                    wanted = guide.logits(guide.hidden[row, place - 1]).softmax(0)
                    each.append((wanted * (wanted.log() - logits.log_softmax(0))).sum())
                    label = int(wanted.argmax())
                hits.append(float(int(logits.argmax()) == label))
        losses.append(torch.stack(each).mean())
        accuracies.append(sum(hits) / len(hits))
    total = sum(weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True)) / sum(WEIGHTS)
    assert isinstance(total, Tensor)
    return total, losses, accuracies


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_gradients_are_those_of_the_formulas(taught: bool, shared: bool) -> None:
    batch, guide = windows(), teacher() if taught else None
    assert batch.counts[:, 1:].sum() % 5 != 0, "the last chunk is to be a short one"
    hidden, matrices = parameters(shared)
    depths = [
        Depth(states, head, offset, weight)
        for states, head, offset, weight in zip(hidden, matrices, OFFSETS, WEIGHTS, strict=True)
    ]
    result = depth_losses(batch, depths, guide, chunk=5)
    (2.5 * result.total).backward()
    ours = [tensor.grad for tensor in (*hidden, *matrices)]
    for tensor in (*hidden, *matrices):
        tensor.grad = None
    total, losses, accuracies = straightforward(batch, hidden, matrices, guide)
    (2.5 * total).backward()
    torch.testing.assert_close(result.total, total.float(), check_dtype=False)
    for depth in range(D):
        torch.testing.assert_close(result.metrics[f"loss@{depth + 1}"], losses[depth].float())
        assert float(result.metrics[f"accuracy@{depth + 1}"]) == pytest.approx(accuracies[depth])
    for got, tensor in zip(ours, (*hidden, *matrices), strict=True):
        torch.testing.assert_close(got, tensor.grad)


def test_frozen_tensors_and_validation_get_no_gradients() -> None:
    hidden, matrices = parameters()
    frozen = [Depth(states, head.detach(), 2) for states, head in zip(hidden, matrices, strict=True)]
    depth_losses(windows(), frozen).total.backward()
    assert all(states.grad is not None for states in hidden)
    assert all(head.grad is None for head in matrices)
    with torch.no_grad():
        quiet = depth_losses(windows(), [Depth(hidden[0], matrices[0], 2)])
    assert not quiet.total.requires_grad


def test_autocast_is_heeded() -> None:
    hidden, matrices = parameters()
    exact = [Depth(s.detach().float().requires_grad_(), m.detach().float(), 2) for s, m in zip(hidden, matrices)]
    wanted = depth_losses(windows(), exact)
    wanted.total.backward()
    rounded = [Depth(d.hidden.detach().requires_grad_(), d.head, 2) for d in exact]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = depth_losses(windows(), rounded)
    got.total.backward()
    assert got.total.item() != wanted.total.item()
    torch.testing.assert_close(got.total, wanted.total, rtol=0.02, atol=0)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.hidden.grad is not None
        torch.testing.assert_close(ours.hidden.grad, theirs.hidden.grad, rtol=0.1, atol=2e-3)


def test_windows_without_labels_give_a_loss_of_zero() -> None:
    hidden, matrices = parameters()
    batch = windows()
    result = depth_losses(Windows(batch.tokens, torch.zeros_like(batch.counts)), [Depth(hidden[0], matrices[0], 2)])
    result.total.backward()
    assert result.total.item() == 0
    assert hidden[0].grad is not None
    assert not hidden[0].grad.any()
