"""Prompt lookup (Saxena, 2023): what followed the row's last tokens when they occurred before.

It costs no model time. Several earlier occurrences become a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from decoding.drafters.base import DrafterContext, TokenDrafter
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from models import kernels
from models.batch import MAX_TREE
from models.tree import NO_PARENT, Trees

RIVAL = 0.5  # a second continuation after the same tokens is about half as likely as the first


def _confidence(match: int) -> float:
    """Chance that the token after a match of this length follows again.

    Fitted to the demo target's text at temperature 0.8 (.33, .48, .60, .69 and .85 for matches of 1 to 5; each token
    that follows lengthens the match). At temperature 0 the chances are up to .15 higher.
    """
    return 1.0 - 0.65 * 0.75 ** (match - 1)


@dataclass(frozen=True)
class NgramOptions:
    """Names as in vLLM's and transformers' prompt lookup."""

    max_match: int = 5  # longest suffix looked up
    min_match: int = 1
    branches: int = 3  # earlier occurrences that become branches, longest match and most recent first


class NgramDrafter(TokenDrafter):
    """Looks the row's last tokens up in the row itself, prompt and output."""

    def __init__(self, options: NgramOptions, context: DrafterContext) -> None:
        if not 1 <= options.min_match <= options.max_match <= 64:
            raise ConfigError("ngram: 1 <= min_match <= max_match <= 64 is needed")
        if options.branches < 1:
            raise ConfigError("ngram: branches must be at least 1")
        self.name = context.name
        self._options = options
        self._bit = context.bit
        self._chance = [_confidence(match) for match in range(options.max_match + MAX_TREE)]
        self._search = (
            self._search_fused if kernels.serves(torch.device("cpu"), torch.float32) else self.search_anywhere
        )

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        return self._search(plan, quota)

    def _search_fused(self, plan: Plan, quota: Quota) -> Trees | None:
        """``search_anywhere`` in one call: see models/kernels/ngram.cpp."""
        options, limits = self._options, quota.rows
        nodes = [limit.nodes if self.name in limit.drafters else 0 for limit in limits]
        if not any(nodes):
            return None
        texts = [torch.from_numpy(row.sequence.tokens) for row in plan.deciding]
        matching = (options.max_match, options.min_match, options.branches)
        arrays = torch.ops.saccade.ngram_trees.default(
            texts, nodes, [limit.depth for limit in limits], *matching, self._chance, RIVAL, self._bit
        )
        return Trees(*arrays) if arrays[0].shape[1] > 1 else None

    def search_anywhere(self, plan: Plan, quota: Quota) -> Trees | None:
        """``propose`` in Python: what it means."""
        tries = [self._trie(row.sequence.tokens, limit) for row, limit in zip(plan.deciding, quota.rows, strict=True)]
        if not any(tries):
            return None
        size = (len(tries), 1 + max(len(trie) for trie in tries))
        tokens, parents, confidence = np.full(size, -1), np.full(size, NO_PARENT), np.zeros(size, dtype=np.float32)
        confidence[:, 0] = 1.0
        for row, (planned, trie) in enumerate(zip(plan.deciding, tries, strict=True)):
            tokens[row, 0] = planned.sequence.tokens[-1]
            if trie:
                used = slice(1, 1 + len(trie))
                parents[row, used], tokens[row, used], confidence[row, used] = zip(*trie, strict=True)
        source = (parents != NO_PARENT).astype(np.int64) << self._bit
        return Trees(*(torch.from_numpy(array) for array in (tokens, parents, confidence, source)))

    def _trie(self, tokens: np.ndarray, limit: RowQuota) -> list[tuple[int, int, float]]:
        """(parent column, token, confidence) of each node, parents first."""
        trie: list[tuple[int, int, float]] = []
        if self.name not in limit.drafters or limit.nodes == 0:
            return trie
        columns: dict[tuple[int, int], int] = {}
        for match, follows in self._occurrences(tokens, limit.depth):
            column, chance = 0, self._chance[match : match + limit.depth]
            for token, confidence in zip(follows, chance, strict=True):
                child = columns.get((column, token))
                if child is None:
                    if len(trie) >= limit.nodes:
                        return trie
                    rivals = sum(1 for parent, _, _ in trie if parent == column)
                    trie.append((column, token, confidence * RIVAL**rivals))
                    child = columns[column, token] = len(trie)
                column = child
        return trie

    def _occurrences(self, tokens: np.ndarray, depth: int) -> list[tuple[int, list[int]]]:
        """(length of the match, the ``depth`` tokens after it) of earlier occurrences, best first."""
        last = len(tokens) - 1
        ends = np.flatnonzero(tokens[:last] == tokens[last])  # last token of each match
        found: list[tuple[int, list[int]]] = []
        by_length = [ends]
        for length in range(2, self._options.max_match + 1):
            ends = ends[ends >= length - 1]
            ends = ends[tokens[ends - (length - 1)] == tokens[last - (length - 1)]] if last >= length - 1 else ends[:0]
            if not len(ends):
                break
            by_length.append(ends)
        seen: set[int] = set()
        for length in range(len(by_length), self._options.min_match - 1, -1):
            for end in by_length[length - 1][::-1][: self._options.branches]:
                if int(end) not in seen:
                    seen.add(int(end))
                    follows = tokens[end + 1 : end + 1 + depth].tolist()
                    while len(follows) < depth:  # a text that repeats itself goes on doing so
                        follows += follows[: depth - len(follows)]
                    found.append((length, follows))
                if len(found) == self._options.branches:
                    return found
        return found
