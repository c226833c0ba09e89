"""Token Recycling (2408.08696): trees of what the target found likely when it last met a token.

Verification computes logits at every node, and throws most of them away. The likeliest tokens of each are kept in a
matrix from token to successors, and the next tree is grown from it: no model, no corpus, no text to search. The
paper's tree has one shape; here it takes the most probable nodes, by what is counted of each rank (successors.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from decoding.batcher import Nodes
from decoding.drafters.base import DrafterContext, Needs, TokenDrafter
from decoding.drafters.rows import last_tokens
from decoding.drafters.successors import (
    GREEDY,
    MADE_UP,
    MAX_VOCAB,
    SAMPLED,
    Lesson,
    Matrices,
    Wish,
    first_counts,
    load_recycling,
)
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import MAX_TREE, RaggedBatch
from models.target import ForwardOutput
from models.transfer import fetch
from models.tree import Trees

MOST_SUCCESSORS = 64


@dataclass(frozen=True)
class RecyclingOptions:
    """Names as in the paper, where k is 8."""

    top_k: int = 8  # successors kept of each token
    nodes: int = MAX_TREE - 1  # of a tree at most; --max-nodes holds, too
    salts: int = 16  # matrices kept at most, one for each cache_salt; the one used longest ago goes first

    def memory_bound(self, vocab_size: int) -> int:
        """Bytes that all matrices take at most: an index and a row of 4-byte entries for each token."""
        return self.salts * vocab_size * 4 * (1 + self.top_k)


@dataclass(frozen=True)
class _Heard:
    """A step's nodes on their way to the host."""

    sequences: list[Sequence]  # those that decided
    lengths: list[int]  # of their texts then
    fetched: Callable[[], list[np.ndarray]]  # nodes' tokens, roots, successors, their logits; paths if there are nodes


class RecyclingDrafter(TokenDrafter):
    """Learns from every verified node of the steps in which it is asked.

    Args:
        context: ``target`` must have fewer than 2^28 ids.

    Raises:
        ConfigError: options that cannot work.
    """

    def __init__(self, options: RecyclingOptions, context: DrafterContext) -> None:
        vocab_size = context.target.vocab_size
        if not 1 <= options.top_k <= MOST_SUCCESSORS:
            raise ConfigError(f"recycling: top_k must be from 1 to {MOST_SUCCESSORS}, not {options.top_k}")
        if not 1 <= options.nodes < MAX_TREE:
            raise ConfigError(f"recycling: nodes must be from 1 to {MAX_TREE - 1}, not {options.nodes}")
        if options.salts < 1:
            raise ConfigError(f"recycling: salts must be at least 1, not {options.salts}")
        if vocab_size > MAX_VOCAB:
            raise ConfigError(
                f"recycling: at most {MAX_VOCAB} token ids are possible, and the target has {vocab_size}; "
                "use another drafter, such as ngram"
            )
        self.name = context.name
        self.needs = Needs(host=True, top=options.top_k, recalls=True)
        self._bit = context.bit
        self._options = options
        self._matrices = Matrices(vocab_size, options.top_k, options.salts)
        self._counts = first_counts(options.top_k)
        self._learn, self._grow = load_recycling()
        self._heard: _Heard | None = None
        self._made_up: set[SequenceId] = set()  # texts under way of which nothing is to stay
        # a device is still busy with the last step's successors: they are looked at while it runs the next step
        self._waits = context.device.type != "cpu"

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        """What is learned from a made-up text is kept apart, and goes with it."""
        if sequence.made_up:
            self._made_up.add(sequence.id)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        nodes = [min(row.nodes, self._options.nodes) if self.name in row.drafters else 0 for row in quota.rows]
        if not any(nodes):
            if not self._waits:
                self._settle()
            return None
        heard = None if self._waits else self._take_heard()
        before = [] if heard is None else heard.sequences
        sequences = [row.sequence for row in plan.deciding]
        matrices, owner = self._matrices.of(_salts([*before, *sequences]))
        lesson = None if heard is None else self._lesson(heard, owner[: len(before)])
        roots, depths = last_tokens(plan), [row.depth for row in quota.rows]
        wish = Wish(owner[len(before) :], _modes(sequences), roots, nodes, depths)
        return self._grow(matrices, self._counts, wish, self._bit, lesson)

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        self._settle()
        if out.top is None:  # it was not asked
            return
        sequences = [row.sequence for row in plan.deciding]
        paths = (verdict.path,) if verdict.path.shape[1] else ()
        shown = (batch.at_wanted(batch.token_ids), nodes.first, out.top.ids, out.top.logits)
        self._heard = _Heard(sequences, [each.length for each in sequences], fetch(*shown, *paths))

    def forget(self, sequence: SequenceId) -> None:
        if sequence in self._made_up:
            self._made_up.discard(sequence)
            self._heard = None
            self._matrices.drop(None)

    def _take_heard(self) -> _Heard | None:
        """What was heard and is not yet learned."""
        heard, self._heard = self._heard, None
        return heard

    def _settle(self) -> None:
        """Learn from the last step in which it was asked; by now the text has gone on."""
        heard = self._take_heard()
        if heard is not None:
            matrices, owner = self._matrices.of(_salts(heard.sequences))
            self._learn(matrices, self._counts, self._lesson(heard, owner))

    def _lesson(self, heard: _Heard, owner: list[int]) -> Lesson:
        tokens, first, ids, logits, *paths = heard.fetched()
        return Lesson(
            owner=owner,
            modes=_modes(heard.sequences),
            texts=[each.tokens[length - 1 :] for each, length in zip(heard.sequences, heard.lengths, strict=True)],
            tokens=tokens,
            first=first,
            path=paths[0] if paths else np.empty((len(first), 0), dtype=np.int64),
            ids=ids[:, : self._options.top_k],
            logits=logits[:, : self._options.top_k],
        )


def _salts(sequences: list[Sequence]) -> list[str | None]:
    """Which matrices they learn from, and fill."""
    return [None if sequence.made_up else sequence.request.cache_salt for sequence in sequences]


def _modes(sequences: list[Sequence]) -> list[int]:
    return [MADE_UP if each.made_up else GREEDY if each.is_greedy else SAMPLED for each in sequences]
