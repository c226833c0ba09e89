"""REST (He et al., 2311.08252): what followed the text's last tokens in a corpus that was prepared beforehand.

The longest end of the text that the corpus has is looked up in the corpus's suffix array (decoding/datastore). What
followed it there makes a trie with counts, and the trie's most probable nodes are the tree. It costs no model time.

REST asks the longest match alone. Where that has few occurrences, shorter ones know more, so the counts are
interpolated, as in language models of n-grams (Dirichlet smoothing, MacKay and Peto 1995).
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import torch

from decoding.datastore.layout import NO_TOKEN, Datastore, Match
from decoding.drafters.base import DrafterContext, TokenDrafter
from decoding.drafters.rows import last_tokens
from decoding.drafters.tries import Node, as_trees
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from models import kernels
from models.batch import MAX_TREE
from models.tree import Trees

IMPROBABLE = 0.01  # nodes whose path is less probable are not worth their way through the planner
MAX_BACKOFF = 3  # as many as the kernel has room for


def _doubt(match: int) -> float:
    """What is added to the number of occurrences of a match, as if so many had gone on as a shorter match says.

    So one occurrence is no certainty, many are, and the longer the match, the fewer it takes. Fitted, by likelihood,
    to the demo target's text (temperatures 0 and 0.8) and a datastore of 3.8 million tokens of Python. There, a match
    of 16 tokens that occurs once goes on as it did in 81% of all cases, one of 8 tokens in 50%, one of 4 in 19%.
    """
    return 16.0 * 0.8 ** (match - 1)


@dataclass(frozen=True)
class RetrievalOptions:
    """Names as in prompt lookup; REST's own are max_token_span (max_match), k (max_matches) and long (depth)."""

    path: str  # of the datastore
    max_match: int = 16  # longest end of the text that is looked up
    min_match: int = 1
    max_matches: int = 256  # of more, so many are looked at, evenly over all; REST: 5000
    backoff: int = 2  # shorter matches that are asked, too, where there are fewer occurrences; REST: 0
    depth: int = 10  # of the tree

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: an option out of range.
        """
        if not 1 <= self.min_match <= self.max_match <= 64:
            raise ConfigError("retrieval: 1 <= min_match <= max_match <= 64 is needed")
        if not 0 <= self.backoff <= MAX_BACKOFF:
            raise ConfigError(f"retrieval: backoff must be from 0 to {MAX_BACKOFF}, not {self.backoff}")
        if not 1 <= self.depth < MAX_TREE:
            raise ConfigError(f"retrieval: depth must be from 1 to {MAX_TREE - 1}, not {self.depth}")
        if not 1 <= self.max_matches <= 2**20:
            raise ConfigError(f"retrieval: max_matches must be from 1 to {2**20}, not {self.max_matches}")


def load_retrieval_drafter(options: RetrievalOptions, context: DrafterContext) -> RetrievalDrafter:
    """The drafter of ``--speculate retrieval=PATH``.

    Raises:
        ModelError: no datastore, a damaged one, or one of another tokenizer.
        ConfigError: an option out of range.
    """
    options.check()
    store = Datastore.open(options.path)
    store.check_vocabulary(context.tokenizer, options.path)
    return RetrievalDrafter(options, context, store)


class RetrievalDrafter(TokenDrafter):
    """Looks the row's last tokens up in a datastore. Keeps nothing of requests."""

    def __init__(self, options: RetrievalOptions, context: DrafterContext, store: Datastore) -> None:
        self.name = context.name
        self.max_depth = options.depth
        self._options = options
        self._bit = context.bit
        self._store = store
        with warnings.catch_warnings():  # of arrays that must not be written; nobody does
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._arrays = [torch.from_numpy(array) for array in (store.tokens, store.suffixes, store.starts)]
        self._ids = min(store.vocabulary.size, context.target.vocab_size)  # others end a match, and what follows it
        self._doubt = [_doubt(match) for match in range(options.max_match + options.depth)]
        fused = kernels.serves(torch.device("cpu"), torch.float32)
        self._search = self._search_fused if fused else self.search_anywhere

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        return self._search(plan, quota)

    def _search_fused(self, plan: Plan, quota: Quota) -> Trees | None:
        """``search_anywhere`` in one call: see models/kernels/retrieval.cpp."""
        options = self._options
        nodes = [limit.nodes if self.name in limit.drafters else 0 for limit in quota.rows]
        if not any(nodes):
            return None
        depths = [min(limit.depth, options.depth) for limit in quota.rows]
        texts = [torch.from_numpy(row.sequence.tokens) for row in plan.deciding]
        looks = (self._ids, options.max_match, options.min_match, options.max_matches, options.backoff)
        arrays = torch.ops.saccade.retrieval_trees.default(
            self._arrays, texts, nodes, depths, *looks, self._doubt, IMPROBABLE, self._bit
        )
        return Trees(*arrays) if arrays[0].shape[1] > 1 else None

    def search_anywhere(self, plan: Plan, quota: Quota) -> Trees | None:
        """``propose`` in Python: what it means."""
        texts = [row.sequence.tokens for row in plan.deciding]
        tries = [self._trie(text, limit) for text, limit in zip(texts, quota.rows, strict=True)]
        return as_trees(tries, last_tokens(plan), self._bit)

    def _trie(self, text: np.ndarray, limit: RowQuota) -> list[Node]:
        """The nodes, the most probable first."""
        if self.name not in limit.drafters or limit.nodes == 0:
            return []
        matches, depth = self._matches(text), min(limit.depth, self._options.depth)
        if not matches or depth == 0:
            return []
        follows = [self._follows(match, depth) for match in matches]
        return self._most_probable(follows, [match.length for match in matches], limit.nodes)

    def _matches(self, text: np.ndarray) -> list[Match]:
        """The longest, then shorter ones, by halves, until there are enough occurrences."""
        options = self._options
        longest = self._store.longest(text, options.min_match, options.max_match, self._ids)
        found = [longest] if longest.length else []
        while found and len(found) <= options.backoff and found[-1].end - found[-1].first < options.max_matches:
            length = max(options.min_match, (found[-1].length + 1) // 2)
            if length == found[-1].length:
                break
            found.append(Match(length, *self._store.find(text[-length:].tolist())))
        return found

    def _follows(self, match: Match, depth: int) -> np.ndarray:
        """[M, depth] what follows each of the occurrences, ``NO_TOKEN`` from where their document ends.

        In lexicographic order, since the suffixes are.
        """
        found = match.end - match.first
        taken = min(found, self._options.max_matches)
        numbers = match.first + np.arange(taken) * found // max(taken, 1)
        places = (self._store.suffixes[numbers].astype(np.int64) + match.length)[:, None] + np.arange(depth)
        stored = self._store.tokens
        tokens = stored[places.clip(0, len(stored) - 1)].astype(np.int64)
        return np.where((places >= 0) & (places < len(stored)) & (tokens < self._ids), tokens, NO_TOKEN)

    def _most_probable(self, follows: list[np.ndarray], lengths: list[int], nodes: int) -> list[Node]:
        """The best ``nodes`` of the trie of all rows of all ``follows`` [M, depth].

        Args:
            lengths: of the matches that they follow, the longest first.
        """
        trie: list[Node] = []
        discovered = itertools.count()  # of equally probable nodes, the first comes first
        waiting: list[tuple[float, int, Node, list[np.ndarray], int]] = []

        def discover(through: list[np.ndarray], column: int, level: int, path: float) -> None:
            """Let the children of a node wait; the rows ``through`` of each of ``follows`` pass through it."""
            there = [after[rows, level] for after, rows in zip(follows, through, strict=True)]
            for token in np.unique(np.concatenate(there)).tolist():
                chance = self._chance([tokens == token for tokens in there], [length + level for length in lengths])
                if token != NO_TOKEN and path * chance >= IMPROBABLE:
                    passing = [rows[tokens == token] for rows, tokens in zip(through, there, strict=True)]
                    heappush(waiting, (-path * chance, next(discovered), (column, token, chance), passing, level + 1))

        discover([np.arange(len(after)) for after in follows], 0, 0, 1.0)
        while waiting and len(trie) < nodes:
            path, _, node, through, level = heappop(waiting)
            trie.append(node)
            if level < follows[0].shape[1]:
                discover(through, len(trie), level, -path)
        return trie

    def _chance(self, equal: list[np.ndarray], lengths: list[int]) -> float:
        """The chance of a token that follows those of the matches for which ``equal`` says so, longest first.

        Its share among the occurrences of the longest match, with the doubt about them going by the next shorter one.
        """
        chance = 0.0
        for those, length in zip(reversed(equal), reversed(lengths), strict=True):
            doubt = self._doubt[length]
            chance = (int(those.sum()) + doubt * chance) / (len(those) + doubt)
        return chance
