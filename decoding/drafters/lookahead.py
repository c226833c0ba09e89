"""Lookahead decoding (2402.02057): the target's own Jacobi iterations fill a pool of n-grams, which are the drafts.

No model, no training: beside the guesses, each verification holds a window of tokens a few places ahead (see
lookahead_window.py), whose nodes are pinned: bought whole or not at all, and not expected to be right. What the target
draws after them continues the window, under the request's own rules and noise, and makes new n-grams. The pool's
n-grams that begin with the root's token are the guesses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from decoding.batcher import Nodes
from decoding.drafters.base import DrafterContext, Needs, TokenDrafter
from decoding.drafters.lookahead_states import Draws, WindowRules, Wish, load_states
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota, RowQuota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import MAX_TREE, RaggedBatch
from models.target import ForwardOutput
from models.transfer import fetch
from models.tree import Trees

logger = logging.getLogger("saccade.engine")

NOBODY = -1  # number of a row without a window


@dataclass(frozen=True)
class LookaheadOptions:
    """Names and defaults as in the paper's code (LEVEL, WINDOW_SIZE, GUESS_SET_SIZE)."""

    level: int = 5  # N, tokens of an n-gram; the window has N - 1 rows
    window_size: int = 7  # W, columns of the window
    guess_set_size: int = 7  # G, n-grams that are kept of each first token, and verified


class LookaheadDrafter(TokenDrafter):
    """Window and pool of each sequence; nothing is shared between them.

    Raises:
        ConfigError: options that cannot be.
    """

    needs = Needs(host=True, draws=True, pins=True)

    def __init__(self, options: LookaheadOptions, context: DrafterContext) -> None:
        _check(options)
        self.name = context.name
        self._bit = context.bit
        self._rules = WindowRules(options.level, options.window_size, options.guess_set_size)
        self._states = load_states(self._rules)
        self._numbers: dict[SequenceId, int] = {}  # of the states
        self._proposed: list[int] = []  # [S] numbers of this step's rows that propose a window; NOBODY
        self._waiting: list[int] = []  # the same of the last step that had windows, until its draws are read
        self._draws: Callable[[], list[np.ndarray]] | None = None
        self._is_narrow = False  # the log says so

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        self._proposed = []
        nodes = [limit.nodes if self.name in limit.drafters else 0 for limit in quota.rows]
        if not any(nodes):
            self._learn()
            return None
        sequences = [row.sequence for row in plan.deciding]
        numbers = [self._number(each) if asked else NOBODY for each, asked in zip(sequences, nodes, strict=True)]
        texts = [torch.from_numpy(sequence.tokens) for sequence in sequences]
        wish = Wish(numbers, texts, nodes, [limit.depth for limit in quota.rows], self._bit)
        arrays, windows = self._states.trees(wish, self._read_draws())
        self._proposed = [number if width else NOBODY for number, width in zip(numbers, windows, strict=True)]
        if not self._is_narrow and min(windows) < self._rules.window_size:
            self._say_if_narrow(zip(windows, sequences, quota.rows, strict=True))
        return Trees(*arrays) if arrays[0].shape[1] > 1 else None

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """Start the copy of what was drawn. It is read in the next ``propose``, when it has long been here."""
        proposed, self._proposed = self._proposed, []
        if verdict.drawn is not None and any(number != NOBODY for number in proposed):
            tokens, masks = batch.at_wanted(batch.token_ids), batch.at_wanted(batch.tree_mask)
            late = len(plan.deciding) - len(proposed)  # rows that joined the step since
            drawn = verdict.drawn.clamp(min=0)  # what is no token may stand in no window
            self._draws = fetch(tokens, masks, drawn, nodes.first)
            self._waiting = proposed + [NOBODY] * late

    def forget(self, sequence: SequenceId) -> None:
        number = self._numbers.pop(sequence, None)
        if number is not None:
            self._states.forget(number)

    def _number(self, sequence: Sequence) -> int:
        number = self._numbers.get(sequence.id)
        if number is None:
            number = self._numbers[sequence.id] = self._states.begin(sequence.seed)
        return number

    def _learn(self) -> None:
        """Let the windows of the last step that had any move on, if they were verified."""
        draws = self._read_draws()
        if draws is not None:
            self._states.learn(*draws)

    def _read_draws(self) -> Draws | None:
        """What was drawn for the windows of the last step that had any; None: nothing that has not been read."""
        draws, self._draws = self._draws, None
        if draws is None:
            return None
        tokens, masks, drawn, first = (torch.from_numpy(each) for each in draws())
        return self._waiting, tokens, masks, drawn, first

    def _say_if_narrow(self, rows: Iterable[tuple[int, Sequence, RowQuota]]) -> None:
        """Log, once, that a text's windows are narrower than asked for, if it is long enough for that to matter."""
        level, wanted, guesses = self._rules.level, self._rules.window_size, self._rules.guess_set_size
        for width, sequence, limit in rows:
            if 0 < width < wanted and sequence.limit - sequence.length > wanted + level:
                self._is_narrow = True
                logger.info(
                    "%s: windows of %d columns in place of %d, as rows are limited to %d nodes and depth %d; "
                    "the full width needs --max-nodes %d --max-depth %d",
                    *(self.name, width, wanted, limit.nodes, limit.depth),
                    *((level - 1) * (wanted + guesses), wanted + level - 2),
                )
                return


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
