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
from models.tree import NO_PARENT, Trees


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
        self._device = context.device

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        tries = [self._trie(row.sequence.tokens, limit) for row, limit in zip(plan.deciding, quota.rows, strict=True)]
        if not any(tries):
            return None
        width = 1 + max(len(trie) for trie in tries)
        tokens = np.full((len(tries), width), -1)
        parents = np.full((len(tries), width), NO_PARENT)
        confidence = np.zeros((len(tries), width), dtype=np.float32)
        for row, (planned, trie) in enumerate(zip(plan.deciding, tries, strict=True)):
            tokens[row, 0], confidence[row, 0] = planned.sequence.tokens[-1], 1.0
            for column, (parent, token, chance) in enumerate(trie, start=1):
                tokens[row, column], parents[row, column], confidence[row, column] = token, parent, chance
        source = (parents != NO_PARENT).astype(np.int64) << self._bit
        arrays = (tokens, parents, confidence, source)
        return Trees(*(torch.from_numpy(array).to(self._device) for array in arrays))

    def _trie(self, tokens: np.ndarray, limit: RowQuota) -> list[tuple[int, int, float]]:
        """(parent column, token, confidence) of each node, parents first."""
        trie: list[tuple[int, int, float]] = []
        if self.name not in limit.drafters or limit.nodes == 0:
            return trie
        columns: dict[tuple[int, int], int] = {}
        for match, follows in self._occurrences(tokens):
            column = 0
            for step in range(limit.depth):
                if len(trie) >= limit.nodes:
                    return trie
                token = follows[step % len(follows)]  # a text that repeats itself goes on doing so
                child = columns.get((column, token))
                if child is None:
                    trie.append((column, token, _confidence(match + step)))
                    child = columns[column, token] = len(trie)
                column = child
        return trie

    def _occurrences(self, tokens: np.ndarray) -> list[tuple[int, list[int]]]:
        """(length of the match, tokens from there to the end) of earlier occurrences, best first."""
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
                    found.append((length, tokens[end + 1 : end + 65].tolist()))
                if len(found) == self._options.branches:
                    return found
        return found


def _confidence(match: int) -> float:
    """Chance that the token after a match of this length follows again; a rough prior."""
    return 1.0 - 0.65 * 0.75 ** (match - 1)
