"""Cross-entropy with the target's distribution, for all passes of a rollout, without ever holding their logits.

Logits of a whole batch would outweigh everything else in memory, and autograd would keep several copies. The gradient
of the loss by the logits is softmax(draft) - softmax(target), so the forward pass goes through the positions in
portions, computes the target's distribution once for all passes, and leaves only the gradients of hidden states and
head behind (the idea of fused linear cross-entropy, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.modules.rollout import Pass

PORTION = {"cpu": 2**22, "cuda": 2**27}  # logits of one portion: in cache on a CPU, enough work for a GPU


@dataclass(frozen=True)
class SoftLabels:
    """What the passes are to predict: label l is the target's distribution after token l + 1 of the window."""

    hidden: Tensor  # [B, L, Ht] the target's, as its LM head takes it
    counts: Tensor  # [B, L] bool
    logits: Callable[[Tensor], Tensor]  # the target's head, [N, Ht] -> [N, V]
    vocabulary: Tensor | None = None  # [Vd] int64, the target's ids of a draft vocabulary; None: all


@dataclass(frozen=True)
class PassLoss:
    """Sums over the labels of one pass."""

    cross_entropy: Tensor  # [] over labels in the vocabulary
    right: Tensor  # [] the first choice is the target's
    labels: Tensor  # [] that count
    covered: Tensor  # [] of these, labels whose best token is in the draft vocabulary


def soft_cross_entropy(
    passes: Sequence[Pass], head: Tensor, labels: SoftLabels, weights: Sequence[float]
) -> tuple[Tensor, list[PassLoss]]:
    """Sum over passes of weight * mean cross-entropy (temperature 1), to backward through; and each pass's sums.

    The target's distribution is restricted to the draft vocabulary and renormalised; labels whose most probable token
    lies outside give no loss and count as wrong guesses. Pass i at anchor a predicts label a + i.

    Args:
        head: [Vd, H], trained if it requires a gradient.
        weights: of each pass.
    """
    train = torch.is_grad_enabled()
    hidden = [each.hidden for each in passes]
    anchors = [each.anchors for each in passes]
    total, sums = _SoftCrossEntropy.apply(head, labels, anchors, tuple(weights), train, *hidden)  # type: ignore[no-untyped-call]
    return total, [PassLoss(*row.unbind()) for row in sums]


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Tensor,
        labels: SoftLabels,
        anchors: list[Tensor],
        weights: tuple[float, ...],
        train: bool,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = head.device.type
        work = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        with torch.autocast(device, enabled=False):
            sums, grad_head, grads = _gradients(head.to(work), labels, anchors, weights, train, hidden, head)
        ctx.grad_head, ctx.grads = grad_head, grads
        means = sums[:, 0] / sums[:, 2].clamp(min=1)
        total = (means * torch.tensor(weights, dtype=means.dtype, device=means.device)).sum()
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer[0]
        grads = [grad * scale.to(grad.dtype) for grad in ctx.grads]
        grad_head = None if ctx.grad_head is None else ctx.grad_head * scale.to(ctx.grad_head.dtype)
        return (grad_head, None, None, None, None, *grads)


def _gradients(
    weight: Tensor,  # [Vd, H] in the dtype of the products
    labels: SoftLabels,
    anchors: list[Tensor],
    weights: tuple[float, ...],
    train: bool,
    hidden: tuple[Tensor, ...],  # of each pass [B, A, H]
    head: Tensor,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Per pass (cross-entropy, right, labels, covered) [steps, 4]; the gradients by head and hidden states."""
    wide = torch.promote_types(hidden[0].dtype, torch.float32)
    grads = [torch.zeros_like(h) for h in hidden] if train else []
    grad_head = torch.zeros_like(head, dtype=wide) if train and head.requires_grad else None
    wanted = [a + step for step, a in enumerate(anchors)]  # label of each anchor
    numbers = torch.stack([labels.counts[:, w].sum() for w in wanted]).to(wide)
    sums = torch.zeros(len(hidden), 4, dtype=wide, device=weight.device)
    sums[:, 2] = numbers
    scale = torch.tensor(weights, dtype=wide, device=weight.device) / numbers.clamp(min=1)
    rows, length = labels.counts.shape
    span = max(1, PORTION[weight.device.type] // (rows * weight.shape[0]))
    bounds = torch.arange(0, length + span, span, device=weight.device)
    places = [torch.searchsorted(w, bounds).tolist() for w in wanted]
    for number, first in enumerate(range(0, length, span)):
        target = _Target.of(labels, slice(first, min(first + span, length)), wide)
        for step, (h, w) in enumerate(zip(hidden, wanted, strict=True)):
            place = slice(places[step][number], places[step][number + 1])
            if place.start == place.stop:
                continue
            seen = target if place.stop - place.start == target.counts.shape[1] else target.at(w[place] - first)
            # matrices: a product with a batch of them would copy the weight for each
            part = h[:, place].reshape(-1, h.shape[2]).to(weight.dtype)  # [N, H]
            found, by_logits = _portion(F.linear(part, weight), seen, train)
            sums[step, [0, 1, 3]] += found
            if train:
                by_logits = by_logits.mul_(scale[step]).to(weight.dtype)
                grads[step][:, place] = (by_logits @ weight).view(rows, -1, h.shape[2]).to(h.dtype)
                if grad_head is not None:
                    grad_head += by_logits.T @ part
    return sums, grad_head, grads


@dataclass(frozen=True)
class _Target:
    """The target's distribution at some labels."""

    probs: Tensor  # [B, n, Vd]
    best: Tensor  # [B, n] place of the most probable token in the draft vocabulary
    counts: Tensor  # [B, n] bool
    covered: Tensor  # [B, n] counts, and the most probable token is in the draft vocabulary

    @staticmethod
    def of(labels: SoftLabels, part: slice, wide: torch.dtype) -> _Target:
        counts = labels.counts[:, part]
        logits = labels.logits(labels.hidden[:, part].flatten(0, 1)).to(wide).view(*counts.shape, -1)
        best = logits.argmax(dim=-1)
        if labels.vocabulary is None:
            return _Target(logits.softmax(dim=-1), best, counts, counts)
        place = torch.searchsorted(labels.vocabulary, best).clamp(max=len(labels.vocabulary) - 1)
        covered = counts & (labels.vocabulary[place] == best)
        return _Target(logits.index_select(2, labels.vocabulary).softmax(dim=-1), place, counts, covered)

    def at(self, places: Tensor) -> _Target:
        return _Target(
            *(getattr(self, name).index_select(1, places) for name in ("probs", "best", "counts", "covered"))
        )


def _portion(logits: Tensor, target: _Target, train: bool) -> tuple[Tensor, Tensor]:
    """(cross-entropy, right, covered) [3] of draft logits [N, Vd], and the gradient of the first by the logits."""
    probs, best, covered = target.probs.flatten(0, 1), target.best.flatten(), target.covered.flatten()
    wide = logits.to(probs.dtype)
    peak = wide.max(dim=-1)
    wide -= peak.values.unsqueeze(-1)
    chosen = torch.bmm(probs[:, None, :], wide[:, :, None]).flatten()  # their product is never in memory
    exponential = wide.exp_()
    mass = exponential.sum(dim=-1)
    right = (covered & (peak.indices == best)).sum()
    loss = ((mass.log() - chosen) * covered).sum()
    found = torch.stack([loss, right.to(loss.dtype), covered.sum().to(loss.dtype)])
    if not train:
        return found, wide
    return found, exponential.div_(mass.unsqueeze(-1)).sub_(probs).mul_(covered.unsqueeze(-1))
