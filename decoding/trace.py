"""The trace of a choice: for each of its steps, what was drafted, by whom, and what came of it.

Steps of rows that did not ask for it fetch nothing and make nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from decoding.messages import StepTrace
from decoding.plan import Plan
from decoding.sequence import Sequence
from models.tree import GUESSED, NO_PARENT, PINS, Trees

# Of one choice, its first ones: a trace is kept until the answer is sent.
MAX_STEPS = 256
MAX_NODES = 4096


def is_traced(sequence: Sequence) -> bool:
    """Whether its next step is to be told."""
    told = sequence.traced
    return sequence.speculation.trace and told.steps < MAX_STEPS and told.nodes < MAX_NODES


def wanted_of(plan: Plan, trees: Trees) -> tuple[Tensor, ...]:
    """What ``TracedTrees`` needs of the chosen trees [R, N], if a deciding row is traced and there are nodes."""
    if trees.width == 1 or not any(is_traced(row.sequence) for row in plan.deciding):
        return ()
    return trees.tokens, trees.parents, trees.confidence


@dataclass(frozen=True)
class TracedTrees:
    """The chosen trees of a step on the host; None: it had no drafted nodes, or nobody asked."""

    tokens: np.ndarray | None = None  # [R, N]
    parents: np.ndarray | None = None
    confidence: np.ndarray | None = None

    def step(
        self,
        row: int,
        position: int,
        root: int,
        source: list[int],
        names: tuple[str, ...],
        accepted: list[int],
        bonus: int | None,
    ) -> StepTrace:
        """What the step did for a row.

        Args:
            position: of the root's token.
            root: that token.
            source: [N] of the nodes, padding included.
            names: of the drafters, by bit.
            accepted: the accepted nodes whose tokens became text.
            bonus: the token after them; None: it did not become text.
        """
        tokens, parents, confidence = [root], [NO_PARENT], [1.0]
        if self.tokens is not None and self.parents is not None and self.confidence is not None:
            count = 1 + int((self.parents[row] != NO_PARENT).sum())  # padding is on the right
            tokens = self.tokens[row, :count].tolist()
            parents = self.parents[row, :count].tolist()
            confidence = self.confidence[row, :count].tolist()
        return StepTrace(
            position=position,
            tokens=tuple(tokens),
            parents=tuple(parents),
            confidence=tuple(confidence),
            drafters=tuple(_names(bits, names) for bits in source[: len(tokens)]),
            accepted=tuple(accepted),
            bonus=bonus,
        )


UNTRACED = TracedTrees()


def _names(source: int, names: tuple[str, ...]) -> tuple[str, ...]:
    proposed = (source & GUESSED) | (source >> PINS)
    return tuple(name for bit, name in enumerate(names) if proposed >> bit & 1)
