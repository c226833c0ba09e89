"""What suffix decoding keeps of texts, and what it drafts from them: the definition, on plain arrays.

models/kernels/suffix.cpp answers the same from suffix trees with counts, in a time that does not depend on how much is
kept; here every question is a look through all of it. This serves where the kernels cannot be built.

A draft begins where the last ``m`` tokens of a text occurred before. A node's share is the part of its parent's
occurrences that go on with it, of those that go on at all; what ends there says nothing. No occurrence, with what
follows it, is longer than ``max_tree_depth``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from decoding.drafters.tries import Node, TreeArrays, trees_of

TOKEN_BYTES = 224  # what a token costs in a tree at most: two nodes, their entries in tables, itself, growth of arrays
REQUEST_BYTES = 1024  # and a text

Saved = tuple[Tensor, Tensor, Tensor]  # trees [n], lengths [n] int64, tokens [sum of lengths] int32


@dataclass(frozen=True)
class SearchSettings:
    """See ``SuffixOptions``."""

    max_tree_depth: int
    max_bytes: int  # enough for a token
    max_cached_requests: int
    max_spec_factor: float
    min_token_prob: float
    trust: tuple[float, ...]  # [max_tree_depth], rising: what a share is worth after a match of that length
    learn_tokens: int = 16  # an output under way is learned by so many tokens at a time: then they meet a warm cache

    def numbers(self) -> tuple[int | float | list[float], ...]:
        """As the kernel takes them."""
        sizes = (self.max_tree_depth, self.max_bytes, self.max_cached_requests, TOKEN_BYTES, REQUEST_BYTES)
        return (*sizes, self.learn_tokens, self.max_spec_factor, self.min_token_prob, list(self.trust))


@dataclass(eq=False)
class _Output:
    """A text that was made here, as far as it is known."""

    tree: int
    tokens: list[int] = field(default_factory=list)
    kept: bool = True


@dataclass
class _Follower:
    tree: int
    learned: int  # tokens of the text that need not be learned (again)
    output: _Output | None = None


class PlainSuffixCache:
    """Outputs, in trees that never see each other, and texts that are under way. Fields and methods as the kernel's."""

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._outputs: list[_Output] = []  # the oldest first
        self._tokens = 0
        self._followers: dict[int, _Follower] = {}
        self._next = 0

    def admit(self, tree: int, known: int) -> int:
        """Follow a text, whose first ``known`` tokens are not to be learned; a number for it."""
        self._followers[self._next] = _Follower(tree, known)
        self._next += 1
        return self._next - 1

    def forget(self, number: int, text: Tensor, keep: bool) -> None:
        """The text [n] int64 ended. keep: its output stays."""
        follower = self._followers.pop(number)
        if keep:
            self._learn(follower, text.tolist())
        elif follower.output is not None and follower.output.kept:
            self._remove(follower.output)

    def insert(self, tree: int, tokens: Tensor) -> None:
        """Add an output of old."""
        self._learn(_Follower(tree, 0), tokens.tolist())

    def texts(self) -> Saved:
        """All outputs, the oldest first."""
        trees = torch.tensor([output.tree for output in self._outputs], dtype=torch.int64)
        lengths = torch.tensor([len(output.tokens) for output in self._outputs], dtype=torch.int64)
        tokens = [token for output in self._outputs for token in output.tokens]
        return trees, lengths, torch.tensor(tokens, dtype=torch.int32)

    def usage(self) -> list[int]:
        """[requests, tokens] of the outputs."""
        return [len(self._outputs), self._tokens]

    def trees(
        self, numbers: Many[int], texts: Many[Tensor], max_nodes: Many[int], max_depth: Many[int], bit: int
    ) -> TreeArrays:
        """The fields of Trees [R, N], one row for each text; rows without nodes or depth get a bare root."""
        limits = zip(numbers, texts, max_nodes, max_depth, strict=True)
        drafts = [self._draft(n, text.numpy(), *limit) if min(limit) > 0 else [] for n, text, *limit in limits]
        made = trees_of(drafts, [int(text[-1]) for text in texts], bit)
        return made.tokens, made.parents, made.confidence, made.source

    # outputs ----------------------------------------------------------------------------------------------------------

    def _learn(self, follower: _Follower, text: list[int]) -> None:
        """Add what is new of a text. Where its beginning had to give way, it begins anew."""
        for token in text[follower.learned :]:
            known = follower.output is not None and follower.output.kept
            while self._outputs and not self._fits(self._tokens + 1, len(self._outputs) + (not known)):
                self._remove(self._outputs[0])
                known = follower.output is not None and follower.output.kept
            if follower.output is None or not known:
                follower.output = _Output(follower.tree)
                self._outputs.append(follower.output)
            follower.output.tokens.append(token)
            self._tokens += 1
            follower.learned += 1

    def _fits(self, tokens: int, requests: int) -> bool:
        enough = tokens * TOKEN_BYTES + requests * REQUEST_BYTES <= self._settings.max_bytes
        return enough and requests <= self._settings.max_cached_requests

    def _remove(self, output: _Output) -> None:
        self._outputs.remove(output)
        self._tokens -= len(output.tokens)
        output.kept = False

    # drafting ---------------------------------------------------------------------------------------------------------

    def _draft(self, number: int, text: np.ndarray, nodes: int, depth: int) -> list[Node]:
        """What follows, by the text itself or by the outputs of its tree, whichever promises more."""
        follower = self._followers[number]
        if len(text) - follower.learned >= self._settings.learn_tokens:
            self._learn(follower, text.tolist())
        outputs = [np.array([*output.tokens, -1]) for output in self._outputs if output.tree == follower.tree]
        own, score = self._best(text, np.append(text, -1), nodes, depth)
        others, best = self._best(text, np.concatenate([*outputs, [-1]]), nodes, depth)
        return others if best > score else own

    def _best(self, text: np.ndarray, corpus: np.ndarray, nodes: int, depth: int) -> tuple[list[Node], float]:
        """The draft of the best score, which is how many of its nodes should be accepted; of equals the longest match.

        Args:
            corpus: texts, with a -1 behind each.
        """
        best: list[Node] = []
        score = 0.0
        ends = np.arange(len(corpus) - 1)  # of matches, the last token
        for length in range(1, min(len(text), self._settings.max_tree_depth - 1) + 1):
            ends = ends[ends >= length - 1]
            ends = ends[corpus[ends - (length - 1)] == text[len(text) - length]]
            if not (corpus[ends + 1] >= 0).any():
                break
            made, reached = self._grow(corpus, ends, length, nodes, depth)
            if reached >= score:
                best, score = made, reached
        return best, score

    def _grow(
        self, corpus: np.ndarray, ends: np.ndarray, length: int, nodes: int, depth: int
    ) -> tuple[list[Node], float]:
        """The most probable continuations of a match, and their score.

        Of equal ones that goes first whose parent did, then the one that occurred last.
        """
        settings = self._settings
        most = min(nodes, int(settings.max_spec_factor * length))
        deepest = min(depth, settings.max_tree_depth - length)
        made: list[Node] = []
        score = 0.0
        queue: list[tuple[float, int, int, float, float, int, np.ndarray]] = []

        def extend(ends: np.ndarray, prob: float, reach: float, column: int, level: int) -> None:
            after = ends[corpus[ends + 1] >= 0] + 1
            for token in np.unique(corpus[after]):
                there = after[corpus[after] == token]
                share = len(there) / len(after)
                if prob * share >= settings.min_token_prob:
                    # (column and last place tell any two apart: nothing behind them is compared)
                    heapq.heappush(queue, (-(prob * share), column, -int(there[-1]), share, reach, level, there))

        extend(ends, 1.0, 1.0, 0, 1)
        while queue and len(made) < most:
            lost, column, last, share, reach, level, there = heapq.heappop(queue)
            confidence = share * settings.trust[length + level - 1]
            reach *= confidence
            made.append((column, int(corpus[-last]), confidence))
            score += reach
            if level < deepest:
                extend(there, -lost, reach, len(made), level + 1)
        return made, score
