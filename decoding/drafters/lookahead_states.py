"""What lookahead keeps of texts, and what it drafts from that: the definition, and the kernel that answers the same.

Each text has a pool of n-grams (ngram_pool.py) and a window (lookahead_window.py), by a number that is given out here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.drafters.lookahead_window import Window
from decoding.drafters.ngram_pool import MAX_KEYS, OCCURRENCES, NgramPool, Tail
from decoding.drafters.tries import Node, TreeArrays, trees_of
from decoding.noise import as_int64
from models import kernels
from models.batch import MAX_TREE
from models.tree import PINS

# Fitted to the demo target's text, between those at temperature 0 (.58, .21 and .05 for different first tokens, then
# .80 to .94) and at 0.8 (.37, .10 and .06, then .70 to .85).
FIRST = 0.5  # chance of the first token of the latest n-gram
FURTHER = 0.8  # chance of each further token of an n-gram
RIVAL = 0.35  # of each different token after the same ones, times this
AHEAD = 0.01  # chance of a window's node
ALL_ONES = (1 << 64) - 1

Draws = tuple[list[int], Tensor, Tensor, Tensor, Tensor]  # arguments of ``LookaheadStates.learn``
Branches = dict[tuple[int, int], int]  # (column of the parent, token) -> column of the node


@dataclass(frozen=True)
class WindowRules:
    """See ``LookaheadOptions``."""

    level: int
    window_size: int
    guess_set_size: int

    def width(self, nodes: int, depth: int) -> int:
        """Columns of a window for which a row has room, its share of guesses beside it; 0: none."""
        share = nodes * self.window_size // (self.window_size + self.guess_set_size)
        return max(0, min(self.window_size, share // (self.level - 1), depth - self.level + 2))

    def numbers(self) -> tuple[int | float, ...]:
        """As the kernel takes them."""
        sizes = (self.level, self.window_size, self.guess_set_size, MAX_KEYS, OCCURRENCES)
        return (*sizes, FIRST, FURTHER, RIVAL, AHEAD)


class Wish(NamedTuple):
    """The trees that the rows of a step would have, one row for each text."""

    numbers: list[int]  # of the texts; any number for a row without nodes, which gets a bare root
    texts: list[Tensor]  # [n] int64 each
    max_nodes: list[int]
    max_depth: list[int]
    bit: int  # the drafter's


class LookaheadStates(Protocol):
    """What ``PlainStates`` and the kernel have in common."""

    def begin(self, seed: int) -> int:
        """A text is under way; a number for it. The seed decides with what a window is filled at first."""
        ...

    def forget(self, number: int) -> None:
        """It ended."""
        ...

    def trees(self, wish: Wish, draws: Draws | None = None) -> tuple[TreeArrays, list[int]]:
        """The fields of Trees [R, N], and the width of the window in each row.

        Args:
            draws: what is to be learned before.
        """
        ...

    def learn(self, numbers: list[int], tokens: Tensor, masks: Tensor, drawn: Tensor, first: Tensor) -> None:
        """Let the windows move on with what was drawn in the step that verified them, if they were verified.

        Args:
            numbers: [S] texts; -1 for rows without a window. Those that have ended since are passed over.
            tokens, masks, drawn: [W] int64 of the step's nodes: token, ancestor mask, and the token drawn there.
            first: [S] int64, node of each root.
        """
        ...

    def window(self, number: int) -> Tensor:
        """[N - 1, W] int64 tokens of a text's window; [0, 0] where it has none."""
        ...

    def usage(self) -> list[int]:
        """Texts, and n-grams that are held of all of them."""
        ...


@dataclass
class _Tree:
    """One row's proposal; nodes of one parent and token are one."""

    nodes: list[Node] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    branches: Branches = field(default_factory=dict)

    def child(self, parent: int, token: int, confidence: float, source: int) -> int:
        """The column of a node, which is there now."""
        column = self.branches.setdefault((parent, token), 1 + len(self.nodes))
        if column > len(self.nodes):
            self.nodes.append((parent, token, confidence))
            self.source.append(source)
        else:
            self.nodes[column - 1] = (parent, token, max(self.nodes[column - 1][2], confidence))
            self.source[column - 1] |= source
        return column


@dataclass
class _State:
    """A text's. ``text`` is what it was when it was first seen."""

    text: np.ndarray
    seed: int
    pool: NgramPool
    read: int  # places of the text whose n-grams the pool has
    window: Window | None = None
    length: int = 0  # of the text that the window stands behind


class PlainStates:
    """``LookaheadStates`` in Python: what it means."""

    def __init__(self, rules: WindowRules) -> None:
        self._rules = rules
        self._seeds: dict[int, int] = {}
        self._states: dict[int, _State] = {}
        self._next = 0

    def begin(self, seed: int) -> int:
        self._seeds[self._next] = seed
        self._next += 1
        return self._next - 1

    def forget(self, number: int) -> None:
        del self._seeds[number]
        self._states.pop(number, None)

    def trees(self, wish: Wish, draws: Draws | None = None) -> tuple[TreeArrays, list[int]]:
        if draws is not None:
            self.learn(*draws)
        trees, windows = [], []
        limits = zip(wish.max_nodes, wish.max_depth, strict=True)
        for number, text, (nodes, depth) in zip(wish.numbers, wish.texts, limits, strict=True):
            tree, width = self._tree(number, text.numpy(), min(nodes, MAX_TREE - 1), depth, wish.bit)
            trees.append(tree)
            windows.append(width)
        made = trees_of([tree.nodes for tree in trees], [int(text[-1]) for text in wish.texts], wish.bit)
        for row, tree in enumerate(trees):
            made.source[row, 1 : 1 + len(tree.source)] = torch.tensor(tree.source, dtype=torch.int64)
        return (made.tokens, made.parents, made.confidence, made.source), windows

    def learn(self, numbers: list[int], tokens: Tensor, masks: Tensor, drawn: Tensor, first: Tensor) -> None:
        starts, after = first.tolist(), drawn.tolist()
        for number, start, end in zip(numbers, starts, [*starts[1:], len(after)], strict=True):
            state = self._states.get(number)
            if state is None or state.window is None:
                continue
            branches = branches_of(tokens[start:end].tolist(), masks[start:end].tolist())
            if columns := columns_of(state.window, branches):
                state.window.advance([after[start + column] for column in columns], state.pool)
                state.length += 1

    def window(self, number: int) -> Tensor:
        state = self._states.get(number)
        if state is None or state.window is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        return torch.tensor(state.window.rows)

    def usage(self) -> list[int]:
        return [len(self._seeds), sum(len(state.pool) for state in self._states.values())]

    def _tree(self, number: int, text: np.ndarray, nodes: int, depth: int, bit: int) -> tuple[_Tree, int]:
        """A row's, and the width of its window."""
        tree, width = _Tree(), 0
        if nodes <= 0:
            return tree, width
        state = self._state(number, text)
        window = self._window(state, len(text), nodes, depth)
        if window is not None:
            window.place(lambda parent, token: tree.child(parent, token, AHEAD, 1 << (PINS + bit)))
            width = window.width
        _hang_guesses(tree, state.pool.find(int(text[-1])), nodes, depth, 1 << bit)
        return tree, width

    def _state(self, number: int, text: np.ndarray) -> _State:
        """The text's, with the n-grams of all of it."""
        level, state = self._rules.level, self._states.get(number)
        if state is None:
            pool = NgramPool(text, level, self._rules.guess_set_size)
            state = _State(text, self._seeds[number], pool, max(0, len(text) - level + 1))
            self._states[number] = state
        for place in range(state.read, len(text) - level + 1):
            head, *tail = text[place : place + level].tolist()
            state.pool.add(head, tuple(tail))
            state.read = place + 1
        return state

    def _window(self, state: _State, length: int, nodes: int, depth: int) -> Window | None:
        """The text's window if the row has room for it. Its width is that for which there was room at first."""
        if state.window is None and (width := self._rules.width(nodes, depth)):
            state.window = Window(self._rules.level, width, state.text, state.seed)
            state.length = length
        window = state.window
        if window is None or window.nodes > nodes or window.depth > depth:
            return None
        window.slide(length - state.length)
        state.length = length
        return window


def _hang_guesses(tree: _Tree, tails: list[Tail], nodes: int, depth: int, guess: int) -> None:
    rivals: Counter[int] = Counter()
    for tail in tails:
        node, chance = 0, FIRST
        for token in tail[:depth]:
            column = tree.branches.get((node, token))
            if column is None and len(tree.nodes) >= nodes:
                return
            if column is None or not tree.source[column - 1] & guess:
                column = tree.child(node, token, chance * RIVAL ** rivals[node], guess)
                rivals[node] += 1
            node, chance = column, FURTHER


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


class FusedStates:
    """``PlainStates`` in one call a step: see models/kernels/lookahead.cpp.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self, rules: WindowRules) -> None:
        kernels.required()
        self._states: Any = torch.classes.saccade.LookaheadStates(*rules.numbers())
        self.forget, self.window, self.learn = self._states.forget, self._states.window, self._states.learn
        self._trees, self._learn_and_draft = self._states.trees, self._states.learn_and_draft

    def begin(self, seed: int) -> int:
        number: int = self._states.begin(as_int64(seed))
        return number

    def trees(self, wish: Wish, draws: Draws | None = None) -> tuple[TreeArrays, list[int]]:
        made = self._trees(*wish) if draws is None else self._learn_and_draft(*draws, *wish)
        tokens, parents, confidence, source, windows = made
        return (tokens, parents, confidence, source), windows

    def usage(self) -> list[int]:
        return list(self._states.usage())


def load_states(rules: WindowRules) -> LookaheadStates:
    """The fastest that there are: they are the host's, whatever the device."""
    return FusedStates(rules) if kernels.load() else PlainStates(rules)
