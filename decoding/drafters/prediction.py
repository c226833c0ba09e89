"""Predicted outputs: follows the text that the client expects to come (OpenAI's ``prediction``), edits included.

As long as the output says what was predicted, the rest of the prediction is one deep chain. Where it departs, the place
is looked for again: where in the prediction the output's last tokens stand, the longest match first, and of those near
to where the output would be after an edit of the tokens that came since. Two places that may both be right become two
branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoding.drafters.base import DrafterContext, TokenDrafter
from decoding.drafters.continuations import Continuation, Node, grow, trees_of
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from models.batch import MAX_TREE
from models.tree import Trees

TRUSTED = 3  # a prediction is believed from the start as if so many tokens of it had come true
SURE = 200.0  # odds of a token after a match of any length, at most: edits are not foreseen
CHANGED = 0.6  # odds that as many tokens were replaced as came since, while nothing matches
INSERTED = 0.25  # odds that those that came were inserted
SHORT_EDIT = 4.0  # further tokens of an edit with which these odds have halved
LONG_EDIT = 48  # and after which these two are no longer tried
REACH = 16.0  # tokens beyond an edit at which a match is believed half as much
FOUND = 4.0  # odds of a place, and how far it must be ahead of the next one, to be the only one from then on
BEFORE, AFTER = 8, 24  # places of a token that are compared on either side of the edit; all are too many
FAR_MATCH = 4  # tokens that must match at places further away

Tokens = NDArray[np.int64]


def _odds(match: int) -> float:
    """Odds that the prediction goes on being right where ``match`` tokens were."""
    return min(2.2 ** (match - 1), SURE)


ODDS = tuple(_odds(match) for match in range(2 * MAX_TREE + 1))
ODDS_TABLE = np.array(ODDS)


@dataclass(frozen=True)
class PredictionOptions:
    """Names as in prompt lookup's."""

    max_match: int = 32  # tokens before a place that are compared when it is looked for
    branches: int = 2  # places that are followed at once while none is certain


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
    """A sequence's alignment, and how many of the sequence's tokens it has seen."""

    alignment: Alignment
    seen: int


class PredictionDrafter(TokenDrafter):
    """Drafts for requests that bring a prediction; others cost nothing.

    Raises:
        ConfigError: options that cannot be.
    """

    def __init__(self, options: PredictionOptions, context: DrafterContext) -> None:
        if not 1 <= options.max_match <= MAX_TREE:
            raise ConfigError(f"prediction: max_match must be in 1 .. {MAX_TREE}, not {options.max_match}")
        if options.branches < 1:
            raise ConfigError(f"prediction: branches must be at least 1, not {options.branches}")
        self.name = context.name
        self._options = options
        self._bit = context.bit
        self._followers: dict[SequenceId, _Follower] = {}

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        if not any(row.sequence.request.prediction_ids for row in plan.deciding):
            return None
        rows = zip(plan.deciding, quota.rows, strict=True)
        return trees_of(plan, [self._nodes(row.sequence, limit) for row, limit in rows], self._bit)

    def forget(self, sequence: SequenceId) -> None:
        self._followers.pop(sequence, None)

    def _nodes(self, sequence: Sequence, limit: RowQuota) -> list[Node]:
        if self.name not in limit.drafters or not limit.nodes or not sequence.request.prediction_ids:
            return []
        text, alignment = sequence.tokens, self._caught_up(sequence)
        places = alignment.places(text, self._options.max_match, self._options.branches)
        guesses = [alignment.after(place, limit.depth) for place in places]
        return grow([guess for guess in guesses if guess.tokens], limit.nodes, limit.depth)

    def _caught_up(self, sequence: Sequence) -> Alignment:
        """The sequence's alignment after all its tokens; it may not have been asked for some steps."""
        follower = self._followers.get(sequence.id)
        if follower is None:
            prediction = np.array(sequence.request.prediction_ids, dtype=np.int64)
            follower = self._followers[sequence.id] = _Follower(Alignment(prediction), sequence.prompt_len)
        follower.alignment.follow(sequence.tokens[follower.seen :].tolist())
        follower.seen = sequence.length
        return follower.alignment
