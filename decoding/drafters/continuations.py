"""One tree out of several guesses at how a text goes on: where they agree they support each other, where they differ
they become branches, and the likeliest nodes come first.

Every guess has a weight at each depth, the odds of its token if it were alone: w against 1 for anything else. Of
several guesses at the same place a token gets the sum of the weights of those that name it, out of all weights and that
same 1 (the mean of a Dirichlet prior with these counts). So confidences of siblings sum to less than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from decoding.drafters.tries import Node


@dataclass(frozen=True)
class Continuation:
    """A guess at what follows, a token for each depth."""

    tokens: Sequence[int]
    weights: Sequence[float]  # odds of each token, given those before it


class _Waiting(NamedTuple):
    """A node that may become part of the tree; its parent is. (A tuple: dozens are made in a step.)"""

    parent: int
    token: int
    confidence: float
    path: float  # probability
    depth: int
    guesses: Sequence[Continuation]  # those that have come this far


def grow(guesses: Sequence[Continuation], nodes: int, depth: int) -> list[Node]:
    """The ``nodes`` most probable nodes no deeper than ``depth``, parents first."""
    if len(guesses) == 1:
        chain = list(zip(guesses[0].tokens, guesses[0].weights))[: min(nodes, depth)]
        return [(level, token, weight / (1.0 + weight)) for level, (token, weight) in enumerate(chain)]
    made: list[Node] = []
    waiting = _branches(guesses, 0, 0, 1.0) if depth else []
    while waiting and len(made) < nodes:
        paths = [node.path for node in waiting]
        best = waiting.pop(paths.index(max(paths)))
        made.append((best.parent, best.token, best.confidence))
        if best.depth < depth:
            waiting += _branches(best.guesses, len(made), best.depth, best.path)
    return made


def _branches(guesses: Sequence[Continuation], column: int, level: int, path: float) -> list[_Waiting]:
    """The children of a node: what the guesses that lead to it say next."""
    if len(guesses) == 1:
        [guess] = guesses
        if level >= len(guess.tokens):
            return []
        confidence = guess.weights[level] / (1.0 + guess.weights[level])
        return [_Waiting(column, guess.tokens[level], confidence, path * confidence, level + 1, guesses)]
    weights: dict[int, float] = {}
    leading: dict[int, list[Continuation]] = {}
    total = 1.0
    for guess in guesses:
        if level < len(guess.tokens):
            token, weight = guess.tokens[level], guess.weights[level]
            weights[token] = weights.get(token, 0.0) + weight
            leading.setdefault(token, []).append(guess)
            total += weight
    return [
        _Waiting(column, token, weight / total, path * (weight / total), level + 1, leading[token])
        for token, weight in weights.items()
    ]
