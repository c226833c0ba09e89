"""Prompt lookup (Saxena, 2023): what followed the row's last tokens when they occurred before, in prompt and output.

The occurrences whose match with the text's end is the longest, and of equals the latest, are weighed against each other
in one tree. They are found in an index of the text that is kept up to date as tokens come (models/kernels/ngram.cpp): a
token costs a constant number of look-ups, however long the text is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.drafters.base import DrafterContext, TokenDrafter
from decoding.drafters.continuations import Continuation, grow
from decoding.drafters.rows import last_tokens
from decoding.drafters.tries import Node, as_trees
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from models import kernels
from models.batch import MAX_TREE
from models.tree import Trees

RECENCY = 0.7  # weight of an occurrence, relative to that of the one before it in rank
FIRST_CAPACITY = 512  # tokens that a new index has room for, at least
LONGEST = 64  # of matches and of the list of occurrences: what the kernel has room for


def _odds(match: int) -> float:
    """Odds that the token after the only match, of this length, follows again.

    Fitted, as is RECENCY, to the demo target's texts at temperatures 0 and 0.8 (least log loss of the first node; each
    token that follows lengthens the match).
    """
    chance = 1.0 - 0.65 * max(0.75 ** (match - 1), 0.02)
    return chance / (1.0 - chance)


@dataclass(frozen=True)
class NgramOptions:
    """Names as in vLLM's and transformers' prompt lookup."""

    max_match: int = 32  # longest suffix looked up; a longer match counts as one of this length
    min_match: int = 1
    branches: int = 8  # earlier occurrences that are weighed, longest match first and of equals the most recent


@dataclass(frozen=True)
class _Index:
    """Where the n-grams of a text have ended. The kernel extends it; a new one is empty."""

    capacity: int  # tokens
    store: Tensor  # [1 + 3 * levels * capacity] int32, see models/kernels/ngram.cpp


class NgramDrafter(TokenDrafter):
    """Looks the row's last tokens up in the row itself.

    Raises:
        ConfigError: options that cannot be.
    """

    def __init__(self, options: NgramOptions, context: DrafterContext) -> None:
        if not 1 <= options.min_match <= options.max_match <= LONGEST:
            raise ConfigError(f"ngram: 1 <= min_match <= max_match <= {LONGEST} is needed")
        if not 1 <= options.branches <= LONGEST:
            raise ConfigError(f"ngram: branches must be at least 1 and at most {LONGEST}, not {options.branches}")
        self.name = context.name
        self._options = options
        self._bit = context.bit
        self._levels = [options.min_match]  # lengths of n-grams that are indexed: doubled up to the longest
        while 2 * self._levels[-1] <= options.max_match:
            self._levels.append(2 * self._levels[-1])
        odds = [_odds(match) for match in range(options.max_match + MAX_TREE)]
        self._weights = [[each * RECENCY**rank for each in odds] for rank in range(options.branches)]
        self._weight_table = torch.tensor(self._weights, dtype=torch.float64)  # [branches, lengths of matches]
        self._indexes: dict[SequenceId, _Index] = {}
        self._unasked = torch.zeros(0, dtype=torch.int32)
        self._search = (
            self._search_fused if kernels.serves(torch.device("cpu"), torch.float32) else self.search_anywhere
        )

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        return self._search(plan, quota)

    def forget(self, sequence: SequenceId) -> None:
        self._indexes.pop(sequence, None)

    def _search_fused(self, plan: Plan, quota: Quota) -> Trees | None:
        """``search_anywhere`` in one call, with an index in place of the search."""
        limits = quota.rows
        nodes = [limit.nodes if self.name in limit.drafters else 0 for limit in limits]
        if not any(nodes):
            return None
        sequences = [row.sequence for row in plan.deciding]
        arrays = torch.ops.saccade.ngram_trees.default(
            [torch.from_numpy(sequence.tokens) for sequence in sequences],
            [self._index(each) if asked else self._unasked for each, asked in zip(sequences, nodes, strict=True)],
            nodes,
            [limit.depth for limit in limits],
            self._options.max_match,
            self._options.min_match,
            self._weight_table,
            self._bit,
        )
        return Trees(*arrays) if arrays[0].shape[1] > 1 else None

    def _index(self, sequence: Sequence) -> Tensor:
        """The sequence's index, with room for its text: one that is full is made anew, twice as large."""
        index = self._indexes.get(sequence.id)
        if index is None or index.capacity < sequence.length:
            capacity = min(sequence.limit, max(FIRST_CAPACITY, 2 * sequence.length))
            store = torch.zeros(1 + 3 * len(self._levels) * capacity, dtype=torch.int32)
            index = self._indexes[sequence.id] = _Index(capacity, store)
        return index.store

    def search_anywhere(self, plan: Plan, quota: Quota) -> Trees | None:
        """``propose`` in Python, without an index: what it means."""
        rows = zip(plan.deciding, quota.rows, strict=True)
        tries = [self._trie(row.sequence.tokens, limit) for row, limit in rows]
        return as_trees(tries, last_tokens(plan), self._bit)

    def _trie(self, tokens: np.ndarray, limit: RowQuota) -> list[Node]:
        if self.name not in limit.drafters or not limit.nodes or not limit.depth:
            return []
        guesses = []
        for rank, (end, match) in enumerate(self._occurrences(tokens)):
            follows = tokens[end + 1 : end + 1 + limit.depth].tolist()
            while len(follows) < limit.depth:  # a text that repeats itself goes on doing so
                follows += follows[: limit.depth - len(follows)]
            guesses.append(Continuation(follows, self._weights[rank][match:]))
        return grow(guesses, limit.nodes, limit.depth)

    def _occurrences(self, tokens: np.ndarray) -> list[tuple[int, int]]:
        """(index of the last token, length of the match) of the best earlier occurrences of the text's end.

        Looked at are the latest ones of each indexed length, the longest first, until there are enough.
        """
        last, most = len(tokens) - 1, self._options.branches
        ends = np.flatnonzero(tokens[:last] == tokens[last])
        by_level, known = [], 1
        for level in self._levels:
            for back in range(known, level):
                ends = ends[ends >= back]
                ends = ends[tokens[ends - back] == tokens[last - back]] if last >= back else ends[:0]
            if not len(ends):
                break
            by_level.append(ends)
            known = level
        found: dict[int, int] = {}
        for ends in reversed(by_level):
            for end in ends[::-1][:most].tolist():
                found.setdefault(end, self._match(tokens, end))
            if len(found) >= most:
                break
        return sorted(found.items(), key=lambda each: (-each[1], -each[0]))[:most]

    def _match(self, tokens: np.ndarray, end: int) -> int:
        """How many tokens up to ``end`` are those at the text's end."""
        last, length = len(tokens) - 1, 1
        while length < self._options.max_match and length <= end and tokens[end - length] == tokens[last - length]:
            length += 1
        return length
