"""Where a target is best left early: each exit's guesses compared with the target's own, against what they cost.

The target writes a few short texts. With agreement a (the share of tokens at which the exit's first choice is the
target's) and cost c (the weights of a draft pass over those of a whole one) a chain of d drafts promises

    (1 - a^(d + 1)) / ((1 - a) (d c + 1))

times the speed of plain decoding (2211.17192, theorem 3.8). The exit that promises most is taken. Nothing is timed: a
model has the same exit on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.batcher import Chain, build
from decoding.cache import pages_for
from decoding.errors import ConfigError
from models.batch import RaggedBatch
from models.early_exit import ExitModel
from models.target import CausalModel, ExitingModel
from models.transfer import upload
from models.tree import root_masks, roots_only

ROWS, LENGTH = 8, 48  # texts, and tokens of each
PORTION = 64  # tokens whose logits exist at one time


@dataclass(frozen=True)
class ExitScore:
    """What is known of one exit."""

    layer: int
    agreement: float  # share of tokens at which its first choice is the target's
    cost: float  # of a draft pass, in passes of the whole model
    depth: int  # of the chain that promises most
    speed: float  # what that promises, in plain decoding's


@dataclass(frozen=True)
class ExitChoice:
    """The scores of all exits that were compared."""

    num_layers: int
    tokens: int  # that they were compared on
    scores: tuple[ExitScore, ...]

    @property
    def best(self) -> ExitScore:
        """The first of those that promise most."""
        return max(self.scores, key=lambda score: score.speed)

    def summary(self) -> str:
        """One line for the log."""
        best = self.best
        return (
            f"drafts with the first {best.layer} of {self.num_layers} layers: their first choice was the target's at "
            f"{best.agreement:.0%} of {self.tokens} tokens, at {best.cost:.2f} of a pass, which promises "
            f"{best.speed:.2f} times plain speed"
        )

    def table(self) -> str:
        """All exits for a report."""
        lines = ["exit after layer  agreement   cost  chain  times plain speed"]
        for score in self.scores:
            mark = "  <- chosen" if score is self.best else ""
            lines.append(
                f"{score.layer:16} {score.agreement:10.3f} {score.cost:6.2f} {score.depth:6} {score.speed:18.2f}{mark}"
            )
        return "\n".join(lines)


def candidates(num_layers: int) -> list[int]:
    """Up to twelve exits, evenly from the first layers to three quarters of them."""
    return sorted({max(1, round(num_layers * part / 16)) for part in range(1, 13)} - {num_layers})


def promise(agreement: float, cost: float, depth: int) -> float:
    """See the module."""
    tokens = sum(agreement**level for level in range(depth + 1))
    return tokens / (depth * cost + 1)


def score_exit(target: ExitingModel, layer: int, agreement: float, deepest: int) -> ExitScore:
    """The score of an exit with this agreement, its chains at most ``deepest``."""
    head = target.vocab_size * target.hidden_size
    cost = (layer * target.layer_size + head) / (target.num_layers * target.layer_size + head)
    depth = max(range(1, deepest + 1), key=lambda depth: promise(agreement, cost, depth))
    return ExitScore(layer, agreement, cost, depth, promise(agreement, cost, depth))


@torch.inference_mode()
def measure_exits(target: ExitingModel, vocab_size: int, start: int | None, deepest: int) -> ExitChoice:
    """Compare the exits of a target: ``LENGTH`` passes of ``ROWS`` tokens, then one of all tokens for each exit.

    Args:
        vocab_size: ids that can be drawn.
        start: the token that texts begin with; None: they have none.

    Raises:
        ConfigError: a model with a single layer.
        ValueError: one that does not work cut short.
    """
    layers = candidates(target.num_layers)
    if not layers:
        raise ConfigError("early-exit: a model of one layer has no earlier exit; leave --speculate early-exit out")
    texts = _Texts(target, vocab_size, start)
    truth = texts.first_choices(target)
    scores = []
    for layer in layers:
        agreement = float((texts.first_choices(ExitModel(target, layer)) == truth).double().mean())
        scores.append(score_exit(target, layer, agreement, deepest))
    return ExitChoice(target.num_layers, len(truth), tuple(scores))


class _Texts:
    """Texts that the target writes at temperature 1, each from a random token on: always the same ones."""

    def __init__(self, target: CausalModel, vocab_size: int, start: int | None) -> None:
        length = min(LENGTH, target.max_model_len)
        pages = pages_for(length)
        self._device, self._vocab_size = target.device, vocab_size
        self._cache = target.new_cache(ROWS * pages)
        self._pages = [list(range(row * pages, (row + 1) * pages)) for row in range(ROWS)]
        generator = torch.Generator().manual_seed(0)
        self._tokens = np.zeros((ROWS, length), dtype=np.int64)
        begun = int(start is not None and length > 1)
        self._tokens[:, :begun] = 0 if start is None else start
        self._tokens[:, begun] = torch.randint(vocab_size, (ROWS,), generator=generator).numpy()
        known = 0  # tokens whose K/V is there
        for end in range(begun + 1, length):
            batch = self._batch(known, end)
            hidden = batch.at_wanted(target.forward(batch, self._cache).hidden)
            probs = target.logits(hidden)[:, :vocab_size].softmax(1).cpu()
            if not bool(probs.isfinite().all()):
                raise ValueError("the logits of the target are no numbers, so its weights are broken")
            self._tokens[:, end] = torch.multinomial(probs, 1, generator=generator)[:, 0].numpy()
            known = end

    def first_choices(self, model: CausalModel) -> Tensor:
        """[T] the most probable token after each of all texts' tokens, one text after the other."""
        hidden = model.forward(self._batch(0, self._tokens.shape[1]), self._cache).hidden
        portions = [model.logits(part)[:, : self._vocab_size] for part in torch.split(hidden, PORTION)]
        return torch.cat([portion.argmax(1) for portion in portions])

    def _batch(self, start: int, end: int) -> RaggedBatch:
        chains = [Chain(row[start:end], start, pages) for row, pages in zip(self._tokens, self._pages, strict=True)]
        [last] = upload(self._device, np.ascontiguousarray(self._tokens[:, end - 1]))
        return build(chains, roots_only(last), root_masks(ROWS, self._device), [1] * ROWS)[0]
