"""Where outputs are in their predictions, and what is drafted from there: the definition, and the kernel of the same.

As long as an output says what was predicted, its place is known. Where it departs, the place is looked for again in
every step: where the output's last tokens stand, the longest match first, and of those near to where the output would
be after an edit of the tokens that came since.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.drafters.continuations import Continuation, grow
from decoding.drafters.tries import Node, TreeArrays, trees_of
from models import kernels
from models.batch import MAX_TREE

TRUSTED = 3  # a prediction is believed from the start as if so many tokens of it had come true
SURE = 200.0  # odds of a token after a match of any length, at most: edits are not foreseen
CHANGED = 0.6  # odds that as many tokens were replaced as came since, while nothing matches
INSERTED = 0.25  # odds that those that came were inserted
SHORT_EDIT = 4.0  # further tokens of an edit with which these odds have halved
LONG_EDIT = 48  # and after which these two are no longer tried
REACH = 16.0  # tokens beyond an edit at which a match is believed half as much
FOUND = 4.0  # odds of a place, and how far it must be ahead of the next one, to be the only one from then on
BEFORE, AFTER = 8, 24  # places of a token that are compared on either side of the edit; all are too many
FAR_MATCH = 4  # tokens that must match at places further away; as in models/kernels/prediction.cpp

Tokens = NDArray[np.int64]


def _odds(match: int) -> float:
    """Odds that the prediction goes on being right where ``match`` tokens were."""
    return min(2.2 ** (match - 1), SURE)


ODDS = tuple(_odds(match) for match in range(2 * MAX_TREE + 1))
ODDS_TABLE = np.array(ODDS)


@dataclass(frozen=True)
class AlignmentRules:
    """See ``PredictionOptions``."""

    max_match: int
    branches: int

    def numbers(self) -> tuple[int | list[float], ...]:
        """As the kernel takes them."""
        factors = [CHANGED, INSERTED, SHORT_EDIT, REACH, FOUND]
        return (self.max_match, self.branches, TRUSTED, LONG_EDIT, BEFORE, AFTER, factors, list(ODDS))


class Alignments(Protocol):
    """What ``PlainAlignments`` and the kernel have in common."""

    def begin(self, prediction: Tensor, seen: int) -> int:
        """A text is under way whose tokens from number ``seen`` on are predicted [M] int64; a number for it."""
        ...

    def forget(self, number: int) -> None:
        """It ended."""
        ...

    def trees(
        self, numbers: list[int], texts: list[Tensor], max_nodes: list[int], max_depth: list[int], bit: int
    ) -> TreeArrays:
        """The fields of Trees [R, N], one row for each text [n] int64.

        A row without nodes or depth gets a bare root, and its number may be any.
        """
        ...


@dataclass(frozen=True)
class Place:
    """Where the output may be in the prediction."""

    index: int  # of the predicted token that would come next
    match: int  # tokens before it that have come, as far as they were compared
    factor: float  # on the odds that a match of this length has

    @property
    def odds(self) -> float:
        """That the next predicted token comes."""
        return ODDS[self.match] * self.factor


class Alignment:
    """Where one output is in its prediction.

    Args:
        prediction: [M] tokens.

    Attributes:
        index: of the predicted token that comes next; while the place is lost, of the one that did not come.
        run: output tokens in a row that were as predicted.
        lost: output tokens since the one that was not; 0 while the place is known.
    """

    def __init__(self, prediction: Tokens) -> None:
        self.index, self.run, self.lost = 0, TRUSTED, 0
        self._tokens: list[int] = prediction.tolist()
        self._prediction = prediction
        self._padded = np.concatenate([np.full(MAX_TREE, -1), prediction])
        self._order = np.argsort(prediction, kind="stable")
        self._sorted = prediction[self._order]

    def follow(self, tokens: list[int]) -> None:
        """These tokens have come."""
        for token in tokens:
            if not self.lost and self.index < len(self._tokens) and self._tokens[self.index] == token:
                self.index += 1
                self.run += 1
            else:
                self.lost += 1
                self.run = 0

    def places(self, text: Tokens, max_match: int, most: int) -> list[Place]:
        """Where the output may be, the likeliest first; once one is certain, the place is known.

        Args:
            text: prompt and output; its end is looked for.
            most: of them.
        """
        if not self.lost:
            return [Place(self.index, min(self.run, MAX_TREE), 1.0)]
        found = {place.index: place for place in self._matches(text[-max_match:], most + 1)}
        if self.lost <= LONG_EDIT:
            fading = SHORT_EDIT / (SHORT_EDIT - 1 + self.lost)
            for index, odds in ((self.index + self.lost, CHANGED), (self.index, INSERTED)):
                found.setdefault(index, Place(index, 1, odds * fading))
        ranked = sorted(found.values(), key=lambda place: -place.odds)
        best, second = (ranked[0].odds if ranked else 0.0), (ranked[1].odds if len(ranked) > 1 else 0.0)
        if best >= FOUND * max(1.0, second):
            self.index, self.run, self.lost = ranked[0].index, ranked[0].match, 0
            return [Place(self.index, self.run, 1.0)]
        return ranked[:most]

    def after(self, place: Place, count: int) -> Continuation:
        """The predicted tokens from a place on, at most ``count``."""
        tokens = self._tokens[place.index : place.index + count]
        weights = ODDS[place.match : place.match + len(tokens)]
        return Continuation(tokens, weights if place.factor == 1.0 else [place.factor * each for each in weights])

    def _matches(self, tail: Tokens, most: int) -> list[Place]:
        """The ``most`` likeliest places where the end of the text, ``tail``, stands in the prediction.

        The edit may have inserted, replaced or deleted tokens: between the first predicted token that did not come and
        as many further on as have come since, every place is as near.
        """
        ends = self._ends(tail)
        if not len(ends):
            return []
        count = len(tail)
        before = self._padded[ends[:, None] + np.arange(MAX_TREE + 1 - count, MAX_TREE + 1)]  # [places, count]
        differ = np.flip(before != tail, axis=1)
        matches = np.where(differ.any(axis=1), differ.argmax(axis=1), count)
        ahead = ends + (1 - self.index)
        factors = 1.0 / (1.0 + np.maximum(np.maximum(ahead - self.lost, -ahead), 0) / REACH)
        best = np.argsort(-ODDS_TABLE[matches] * factors, kind="stable")[:most]
        return [Place(int(ends[i]) + 1, int(matches[i]), float(factors[i])) for i in best]

    def _ends(self, tail: Tokens) -> NDArray[np.intp]:
        """Where the last token stands: near to the edit, and further away where the ones before it match, too."""
        low, high = np.searchsorted(self._sorted, (tail[-1], tail[-1] + 1))
        ends = self._order[low:high]  # rising
        near = self._near(ends)
        if len(near) == len(ends) or len(tail) < FAR_MATCH:
            return near
        for back in range(1, FAR_MATCH):
            ends = ends[self._padded[ends + (MAX_TREE - back)] == tail[-1 - back]]
        return np.union1d(near, self._near(ends)) if len(ends) else near

    def _near(self, ends: NDArray[np.intp]) -> NDArray[np.intp]:
        at = int(np.searchsorted(ends, self.index))
        return ends[max(0, at - BEFORE) : at + AFTER]


@dataclass
class _Follower:
    """A text's alignment, and how many of the text's tokens it has seen."""

    alignment: Alignment
    seen: int

    def caught_up(self, text: Tokens) -> Alignment:
        """The alignment after all of a text; it may not have been asked for some steps."""
        self.alignment.follow(text[self.seen :].tolist())
        self.seen = len(text)
        return self.alignment


class PlainAlignments:
    """``Alignments`` in Python: what it means."""

    def __init__(self, rules: AlignmentRules) -> None:
        self._rules = rules
        self._followers: dict[int, _Follower] = {}
        self._next = 0

    def begin(self, prediction: Tensor, seen: int) -> int:
        self._followers[self._next] = _Follower(Alignment(prediction.numpy()), seen)
        self._next += 1
        return self._next - 1

    def forget(self, number: int) -> None:
        del self._followers[number]

    def trees(
        self, numbers: Many[int], texts: Many[Tensor], max_nodes: Many[int], max_depth: Many[int], bit: int
    ) -> TreeArrays:
        limits = zip(numbers, texts, max_nodes, max_depth, strict=True)
        tries = [self._nodes(n, text.numpy(), *limit) if min(limit) > 0 else [] for n, text, *limit in limits]
        made = trees_of(tries, [int(text[-1]) for text in texts], bit)
        return made.tokens, made.parents, made.confidence, made.source

    def _nodes(self, number: int, text: Tokens, nodes: int, depth: int) -> list[Node]:
        alignment = self._followers[number].caught_up(text)
        places = alignment.places(text, self._rules.max_match, self._rules.branches)
        guesses = [alignment.after(place, depth) for place in places]
        return grow([guess for guess in guesses if guess.tokens], nodes, depth)


class FusedAlignments:
    """``PlainAlignments`` in one call a step: see models/kernels/prediction.cpp.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self, rules: AlignmentRules) -> None:
        kernels.required()
        alignments: Any = torch.classes.saccade.PredictionAlignments(*rules.numbers())
        self.begin, self.forget, self.trees = alignments.begin, alignments.forget, alignments.trees


def load_alignments(rules: AlignmentRules) -> Alignments:
    """The fastest that there are: they are the host's, whatever the device."""
    return FusedAlignments(rules) if kernels.load() else PlainAlignments(rules)
