"""Lookahead decoding (2402.02057): the target's own Jacobi iterations fill a pool of n-grams, which are the drafts.

No model, no training: beside the guesses, each verification holds a window of tokens a few places ahead (see
lookahead_window.py), whose nodes are pinned: bought whole or not at all, and not expected to be right. What the target
draws after them continues the window, under the request's own rules and noise, and makes new n-grams. The pool's
n-grams that begin with the root's token are the guesses.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from decoding.batcher import Nodes
from decoding.drafters.base import DrafterContext, Needs, TokenDrafter
from decoding.drafters.lookahead_window import Window
from decoding.drafters.ngram_pool import NgramPool, Tail
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import MAX_TREE, RaggedBatch
from models.target import ForwardOutput
from models.transfer import fetch
from models.tree import NO_PARENT, PINS, Trees

logger = logging.getLogger("saccade.engine")

# Fitted to the demo target's text, between those at temperature 0 (.58, .21 and .05 for different first tokens, then
# .80 to .94) and at 0.8 (.37, .10 and .06, then .70 to .85).
FIRST = 0.5  # chance of the first token of the latest n-gram
FURTHER = 0.8  # chance of each further token of an n-gram
RIVAL = 0.35  # of each different token after the same ones, times this
AHEAD = 0.01  # chance of a window's node
ALL_ONES = (1 << 64) - 1

Branches = dict[tuple[int, int], int]  # (column of the parent, token) -> column of the node


@dataclass(frozen=True)
class LookaheadOptions:
    """Names and defaults as in the paper's code (LEVEL, WINDOW_SIZE, GUESS_SET_SIZE)."""

    level: int = 5  # N, tokens of an n-gram; the window has N - 1 rows
    window_size: int = 7  # W, columns of the window
    guess_set_size: int = 7  # G, n-grams that are kept of each first token, and verified


@dataclass
class _Tree:
    """One row's proposal, column by column; nodes of one parent and token are one."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [NO_PARENT])
    confidence: list[float] = field(default_factory=lambda: [1.0])
    source: list[int] = field(default_factory=lambda: [0])
    branches: Branches = field(default_factory=dict)

    def child(self, parent: int, token: int, confidence: float, source: int) -> int:
        """The column of a node, which is there now."""
        column = self.branches.setdefault((parent, token), len(self.tokens))
        if column == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.confidence.append(confidence)
            self.source.append(source)
        else:
            self.confidence[column] = max(self.confidence[column], confidence)
            self.source[column] |= source
        return column


@dataclass
class _State:
    """What is known of one sequence."""

    sequence: Sequence
    pool: NgramPool
    read: int  # n-grams of the text that begin before this place are in the pool
    window: Window | None = None
    length: int = 0  # of the text that the window stands behind


class LookaheadDrafter(TokenDrafter):
    """Window and pool of each sequence; nothing is shared between them."""

    needs = Needs(host=True, draws=True, pins=True)

    def __init__(self, options: LookaheadOptions, context: DrafterContext) -> None:
        _check(options)
        self.name = context.name
        self._options = options
        self._guess, self._pin = 1 << context.bit, 1 << (PINS + context.bit)
        self._states: dict[SequenceId, _State] = {}
        self._proposed: dict[int, _State] = {}  # deciding rows of this step that propose a window
        self._waiting: dict[int, _State] = {}  # of the last step that had windows, until its draws are read
        self._draws: Callable[[], list[np.ndarray]] | None = None
        self._is_narrow = False  # the log says so

    # one step ---------------------------------------------------------------------------------------------------------

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        self._read_draws()
        self._proposed = {}
        trees = [
            self._tree(number, row.sequence, limit)
            for number, (row, limit) in enumerate(zip(plan.deciding, quota.rows, strict=True))
        ]
        width = max((len(tree.tokens) for tree in trees), default=1)
        return packed(trees, width) if width > 1 else None

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """Start the copy of what was drawn. It is read in the next ``propose``, when it has long been here."""
        proposed, self._proposed = self._proposed, {}
        if proposed and verdict.drawn is not None:
            tokens, masks = batch.at_wanted(batch.token_ids), batch.at_wanted(batch.tree_mask)
            self._draws, self._waiting = fetch(tokens, masks, verdict.drawn, nodes.first), proposed

    def forget(self, sequence: SequenceId) -> None:
        self._states.pop(sequence, None)

    # proposing --------------------------------------------------------------------------------------------------------

    def _tree(self, number: int, sequence: Sequence, limit: RowQuota) -> _Tree:
        tree = _Tree([int(sequence.tokens[-1])])
        if not limit.nodes or self.name not in limit.drafters:
            return tree
        state = self._state(sequence)
        window = self._window(state, limit)
        if window is not None:
            window.place(lambda parent, token: tree.child(parent, token, AHEAD, self._pin))
            self._proposed[number] = state
        self._hang_guesses(tree, state.pool.find(tree.tokens[0]), limit)
        return tree

    def _hang_guesses(self, tree: _Tree, tails: list[Tail], limit: RowQuota) -> None:
        rivals: Counter[int] = Counter()
        for tail in tails:
            node, chance = 0, FIRST
            for token in tail[: limit.depth]:
                column = tree.branches.get((node, token))
                if column is None and len(tree.tokens) > limit.nodes:
                    return
                if column is None or not tree.source[column] & self._guess:
                    column = tree.child(node, token, chance * RIVAL ** rivals[node], self._guess)
                    rivals[node] += 1
                node, chance = column, FURTHER

    def _state(self, sequence: Sequence) -> _State:
        """The sequence's, with the n-grams of its text up to now."""
        level, tokens, state = self._options.level, sequence.tokens, self._states.get(sequence.id)
        if state is None:
            pool = NgramPool(tokens, level, self._options.guess_set_size)
            state = _State(sequence, pool, max(0, sequence.length - level + 1))
            self._states[sequence.id] = state
        for place in range(state.read, sequence.length - level + 1):
            first, *tail = tokens[place : place + level].tolist()
            state.pool.add(first, tuple(tail))
            state.read = place + 1
        return state

    def _window(self, state: _State, limit: RowQuota) -> Window | None:
        """The sequence's window if the row has room for it. Its width is that for which there was room at first."""
        sequence = state.sequence
        if state.window is None and (width := self._width(limit, sequence.limit - sequence.length)):
            state.window = Window(self._options.level, width, sequence.tokens, sequence.seed)
            state.length = sequence.length
        window = state.window
        if window is None or window.nodes > limit.nodes or window.depth > limit.depth:
            return None
        window.slide(sequence.length - state.length)
        state.length = sequence.length
        return window

    def _width(self, limit: RowQuota, left: int) -> int:
        """Columns of a window for which a row has room, its share of guesses beside it; 0: none.

        Args:
            left: tokens that the text may still grow by.
        """
        level, wanted = self._options.level, self._options.window_size
        share = limit.nodes * wanted // (wanted + self._options.guess_set_size)
        width = max(0, min(wanted, share // (level - 1), limit.depth - level + 2))
        if 0 < width < wanted and left > wanted + level and not self._is_narrow:
            self._is_narrow = True
            logger.info(
                "%s: windows of %d columns in place of %d, as rows are limited to %d nodes and depth %d; "
                "the full width needs --max-nodes %d --max-depth %d",
                *(self.name, width, wanted, limit.nodes, limit.depth),
                *((level - 1) * (wanted + self._options.guess_set_size), wanted + level - 2),
            )
        return width

    # what was drawn ---------------------------------------------------------------------------------------------------

    def _read_draws(self) -> None:
        """Let the windows of the last step that had any move on, if they were verified."""
        if self._draws is None:
            return
        tokens, masks, drawn, first = (each.tolist() for each in self._draws())
        self._draws = None
        ends = [*first[1:], len(drawn)]
        for number, state in self._waiting.items():
            row = slice(first[number], ends[number])
            if state.window and (columns := columns_of(state.window, branches_of(tokens[row], masks[row]))):
                after = drawn[row]
                state.window.advance([after[column] for column in columns], state.pool)
                state.length += 1


def columns_of(window: Window, branches: Branches) -> list[int] | None:
    """[W] the columns of the last row's nodes in a tree; None where the window is not in it."""
    return window.place(lambda parent, token: branches.get((parent, token)))


def branches_of(tokens: list[int], masks: list[int]) -> Branches:
    """The nodes of one tree by parent and token, from the tokens and ancestor masks of its columns."""
    branches: Branches = {}
    for column in range(1, len(tokens)):
        above = masks[column] & ALL_ONES & ~(1 << column)
        # padding looks like a child of the root, and stands behind the root's children
        branches.setdefault((above.bit_length() - 1, tokens[column]), column)
    return branches


def packed(trees: list[_Tree], width: int) -> Trees:
    """[R, width] on the host."""
    size = (len(trees), width)
    tokens, parents = np.full(size, -1), np.full(size, NO_PARENT)
    confidence, source = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.int64)
    for row, tree in enumerate(trees):
        used = slice(0, len(tree.tokens))
        tokens[row, used], parents[row, used] = tree.tokens, tree.parents
        confidence[row, used], source[row, used] = tree.confidence, tree.source
    return Trees(*(torch.from_numpy(array) for array in (tokens, parents, confidence, source)))


def _check(options: LookaheadOptions) -> None:
    level, width, guesses = options.level, options.window_size, options.guess_set_size
    if level < 3:
        raise ConfigError(f"lookahead: level must be at least 3 (an n-gram has a first token and a tail), not {level}")
    if width < 1 or guesses < 1:
        raise ConfigError("lookahead: window_size and guess_set_size must be at least 1")
    nodes, depth = (level - 1) * width, width + level - 2
    if max(nodes, depth) >= MAX_TREE:
        raise ConfigError(
            f"lookahead: a window of {width} columns at level {level} has {nodes} nodes, and a tree has at most "
            f"{MAX_TREE - 1} below its root: lower window_size or level"
        )
