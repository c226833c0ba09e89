"""Losses over a large vocabulary for every drafted depth at once, in memory that does not grow with the batch.

Logits [tokens, V] of all depths of a batch are gigabytes; here they exist for a few hundred tokens at a time. The
loss's gradient with respect to them is known in closed form, softmax(z) - wanted, so it is taken in the forward pass:
a chunk costs three products and no recomputation. The target's probabilities of a token serve all depths that guess it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.recipe import Losses, Windows

LABELS = ("target", "text")  # what recipes may be asked to learn: the target's distributions, or the tokens that came

# logits of one chunk: stays in cache on a CPU (26 us a token against 45 with 4 times as many), fills a GPU
_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**27}


@dataclass(frozen=True)
class Depth:
    """What guesses one drafted depth: at position t the token t + ``offset``, by logits hidden @ head^T."""

    hidden: Tensor  # [B, S, H]
    head: Tensor  # [V, H]; depths may share one
    offset: int  # 2 for the first drafted token: the target itself guesses t + 1
    weight: float = 1.0  # in the total, relative to the other depths


@dataclass(frozen=True)
class Teacher:
    """The target, whose distribution is to be matched instead of the text."""

    hidden: Tensor  # [B, S, H] of the target after its final norm
    logits: Callable[[Tensor], Tensor]  # [N, H] -> [N, V] float32, without gradients


def depth_losses(
    windows: Windows,
    depths: Sequence[Depth],
    teacher: Teacher | None = None,
    chunk: int | None = None,
) -> Losses:
    """Mean loss over the windows' labels, summed over depths by weight.

    Without a teacher it is the cross-entropy of the text; with one KL(target || draft) at temperature 1, the target's
    distribution being that at the guessed token (the best label for a drafter of sampled text: its acceptance is the
    overlap of the two). A label nearer to its window's start than a depth's offset does not count for that depth.

    Args:
        chunk: labels whose logits exist at one time; default: what suits the device.

    Returns:
        ``loss@d`` and ``accuracy@d`` for depths d = 1 .. D; accuracy is how often a head's first choice is the text's
        token, with a teacher the target's first choice. Under ``torch.no_grad`` no gradients are computed.
    """
    length = windows.tokens.shape[1]
    at = windows.counts.flatten().nonzero().squeeze(1)
    place = at % length
    at, place = at[place > 0], place[place > 0]
    heads = list({id(depth.head): depth.head for depth in depths}.values())
    weights = torch.tensor([depth.weight for depth in depths], device=at.device)
    job = _Job(
        labels=windows.tokens.flatten()[at],
        counted=torch.stack([place >= depth.offset for depth in depths]),
        shares=weights / weights.sum(),
        which=[next(i for i, head in enumerate(heads) if head is depth.head) for depth in depths],
        taught=None if teacher is None else (teacher.hidden.flatten(0, 1)[at - 1], teacher.logits),
        chunk=chunk or max(1, _CHUNK_LOGITS[at.device.type] // heads[0].shape[0]),
        gradients=torch.is_grad_enabled(),
    )
    inputs = [depth.hidden.flatten(0, 1)[(at - depth.offset).clamp(min=0)] for depth in depths]
    total, losses, accuracies = _DepthLosses.apply(job, *inputs, *heads)  # type: ignore[no-untyped-call]
    metrics = {f"loss@{d}": loss for d, loss in enumerate(losses.unbind(), start=1)}
    metrics |= {f"accuracy@{d}": accuracy for d, accuracy in enumerate(accuracies.unbind(), start=1)}
    return Losses(total, metrics)


@dataclass(frozen=True)
class _Job:
    """The N labels of a batch and what is wanted at them."""

    labels: Tensor  # [N] int64
    counted: Tensor  # [D, N] bool
    shares: Tensor  # [D] float32, of the depths in the total
    which: list[int]  # head of each depth
    taught: tuple[Tensor, Callable[[Tensor], Tensor]] | None  # ([N, H], to logits)
    chunk: int  # labels
    gradients: bool


@dataclass(frozen=True)
class _Wanted:
    """What the logits of a chunk should be like."""

    first: Tensor  # [C] int64, what is to be ranked first
    probs: Tensor | None = None  # [C, V] float32, of the target
    negative_entropy: Tensor | None = None  # [C]


class _DepthLosses(torch.autograd.Function):
    """(total, losses [D], accuracies [D]) of inputs x_d [N, H] of D depths and the heads that they use."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        depths = len(job.which)
        inputs, heads = tensors[:depths], tensors[depths:]
        sums = _Sums(job, inputs, heads)
        for first in range(0, len(job.labels), job.chunk):
            rows = slice(first, first + job.chunk)
            wanted = _wanted(job, rows)
            for depth in range(depths):
                sums.add(depth, rows, wanted)
        ctx.gradients = sums.gradients()
        losses, accuracies = sums.results()
        ctx.mark_non_differentiable(losses, accuracies)
        return (losses * job.shares).sum(), losses, accuracies

    @staticmethod
    def backward(ctx: Any, total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else gradient * total for gradient in ctx.gradients)


class _Sums:
    """Losses, hits and gradients, gathered chunk by chunk."""

    def __init__(self, job: _Job, inputs: tuple[Tensor, ...], heads: tuple[Tensor, ...]) -> None:
        self._job, self._inputs = job, inputs
        device = inputs[0].device
        autocast = torch.is_autocast_enabled(device.type)
        self._heads = [head.to(torch.get_autocast_dtype(device.type)) if autocast else head for head in heads]
        self._count = job.counted.sum(1).clamp(min=1)  # [D]
        # of a chunk's gradients, before the division by N at the end: of the order of 1, whatever the dtype
        self._scale = job.counted * (job.shares * len(job.labels) / self._count)[:, None]
        self._losses = torch.zeros(len(inputs), device=device)
        self._hits = torch.zeros(len(inputs), device=device)
        exact = torch.promote_types(inputs[0].dtype, torch.float32)
        wants = [job.gradients and tensor.requires_grad for tensor in (*inputs, *heads)]
        self._gradients = [
            torch.zeros(tensor.shape, dtype=exact, device=device) if wanted else None
            for tensor, wanted in zip((*inputs, *heads), wants, strict=True)
        ]

    def add(self, depth: int, rows: slice, wanted: _Wanted) -> None:
        """Loss and gradients of a depth at a chunk of labels."""
        which = self._job.which[depth]
        x, head = self._inputs[depth][rows], self._heads[which]
        x = x.to(head.dtype)
        logits = F.linear(x, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs, log_sum = _softmax(logits)
        counted = self._job.counted[depth, rows]
        self._losses[depth] += (_loss(logits, log_sum, wanted) * counted).sum()
        self._hits[depth] += ((logits.argmax(1) == wanted.first) & counted).sum()
        into_x, into_head = self._gradients[depth], self._gradients[len(self._inputs) + which]
        if into_x is None and into_head is None:
            return
        slope = _slope(probs, wanted).mul_(self._scale[depth, rows, None]).to(head.dtype)
        if into_x is not None:
            into_x[rows] = (slope @ head).to(into_x.dtype)
        if into_head is not None:
            into_head += slope.t() @ x

    def gradients(self) -> list[Tensor | None]:
        """Of the total with respect to every input, then every head."""
        tokens = max(1, len(self._job.labels))
        return [None if gradient is None else gradient.div_(tokens) for gradient in self._gradients]

    def results(self) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy [D]."""
        return self._losses / self._count, self._hits / self._count


def _wanted(job: _Job, rows: slice) -> _Wanted:
    if job.taught is None:
        return _Wanted(job.labels[rows])
    hidden, to_logits = job.taught
    logits = to_logits(hidden[rows])
    probs, log_sum = _softmax(logits)
    return _Wanted(logits.argmax(1), probs, torch.linalg.vecdot(probs, logits) - log_sum)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [C, V], log-sum-exp [C]) of logits [C, V]."""
    probs = logits.softmax(1)
    return probs, logits.amax(1) - probs.amax(1).log()  # the exponentials are not computed twice


def _loss(logits: Tensor, log_sum: Tensor, wanted: _Wanted) -> Tensor:
    """[C] cross-entropy of the label, or KL(target || draft)."""
    if wanted.probs is None or wanted.negative_entropy is None:
        return log_sum - logits.gather(1, wanted.first[:, None]).squeeze(1)
    expected: Tensor = torch.linalg.vecdot(wanted.probs, logits)
    return wanted.negative_entropy - expected + log_sum


def _slope(probs: Tensor, wanted: _Wanted) -> Tensor:
    """[C, V] the loss's gradient with respect to the logits; overwrites ``probs``."""
    if wanted.probs is None:
        at = wanted.first[:, None]
        return probs.scatter_add_(1, at, probs.new_full(at.shape, -1.0))
    return probs.sub_(wanted.probs)
