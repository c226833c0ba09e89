"""Where one text stands in its grammar, and what may follow it and every path of a tree that hangs on its end.

The library's matcher walks forward by tokens. Here it visits the paths of a tree depth first: a node costs one token
forward and its mask; a branch, or a path that the text left, a copy of the matcher at the text, which takes as long as
the text is. A text that is what was visited, drafts included, goes on without one. What may follow is a function of the
grammar and the tokens alone, so the text cannot depend on which paths were visited.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from decoding.grammar.compiler import Compiled
from models.batch import MAX_TREE

Words = NDArray[np.int32]  # 32 ids a word, the lowest bit first
Path = tuple[int, ...]
Ending = Literal["stop", "error"]

SLOW = 0.002  # seconds a node, beside which drafts do not pay
SLOWNESS_RATE = 0.2


def words_of(vocab_size: int) -> int:
    """Words of a mask: there is one bit more than ids, the library's own "here it may end"."""
    return vocab_size // 32 + 1


class Matcher:
    """Of one sequence. It stands at the committed text; paths are tokens after that.

    Args:
        ends: ids that end a text where it is complete, the likeliest one first. Without any, it ends by itself where
            nothing can follow.
        min_tokens: before that many it ends only where nothing else can follow.
        goes_on: it always ends only there (``ignore_eos``).
    """

    def __init__(self, compiled: Compiled, ends: tuple[int, ...], min_tokens: int = 0, goes_on: bool = False) -> None:
        self.compiled = compiled
        self._at_text = compiled.start.deep_copy()  # stands at the text, and is never asked for a mask
        self._inner: Any = self._at_text.deep_copy()  # visits paths, never turns back; None: begins at the text again
        self._vocab_size = compiled.vocab_size
        self._ends = ends
        self._end_words = np.zeros(words_of(compiled.vocab_size), dtype=np.int32)
        for token in ends:
            self._end_words[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
        self._min_tokens = min_tokens
        self._goes_on = goes_on
        self._text: list[int] = []
        self._path: list[int] = []  # where ``_inner`` stands, after the text
        # of paths in this step; None: no text gets there, or what follows could not be computed
        self._masks: dict[Path, Words | None] = {}
        self._failed: set[Path] = set()  # the library came to its limits
        self._forced: list[int] | None = None  # tokens that must follow the text; None: not looked at yet
        self._slowness = 0.0  # seconds that a node's mask takes, walking there included

    @property
    def is_slow(self) -> bool:
        """Masks take so long that every drafted node costs more than it can save."""
        return self._slowness > SLOW

    def resume(self, tokens: list[int]) -> None:
        """Stand after these committed tokens, which another matcher of the same grammar has taken."""
        self._text = tokens
        self._mend()

    def masks(self, paths: Sequence[Path]) -> list[Words | None]:
        """What may follow each path; None where it does not matter: no text gets there, or none goes on from there."""
        new = sorted(set(paths) - self._masks.keys())  # depth first
        started = time.thread_time()  # not the clock's: on a busy machine another process may have the core
        for path in new:
            self._masks[path] = self._mask() if self._walk(path) else None
        if new:
            self._slowness += SLOWNESS_RATE * ((time.thread_time() - started) / len(new) - self._slowness)
        return [self._masks[path] for path in paths]

    def allows(self, path: Path) -> bool:
        """Whether the text may go on like this; of what is forced, in the very tokens that ``forced`` names."""
        forced = self.forced()[: len(path)]
        if tuple(forced) != path[: len(forced)]:
            return False
        if len(forced) == len(path):
            return True
        if path[-1] in self._ends and self._walk(path[:-1]) and self._may_end():
            return True
        return self._walk(path)

    def forced(self) -> list[int]:
        """Tokens of which each must follow the one before: a guess at how the model spells the text that must come."""
        if self._forced is None:
            self._forced = self._found_forced()
        return self._forced

    def commit(self, tokens: Sequence[int]) -> tuple[int, Ending | None]:
        """Move the text on by the tokens that were drawn: (how many of them are its own, why it ends there)."""
        visitor, visited = self._inner, self._path
        self._inner, self._path = self._at_text, []
        kept = 0
        ending: Ending | None = None
        while kept < len(tokens) and ending is None:
            if tuple(self._path) in self._failed:  # what was drawn there was drawn without a mask
                ending = "error"
            else:
                ending = self._step(tokens[kept])
                kept += ending != "error"
        self._follow_forced(tokens[:kept])
        self._text += self._path
        self._at_text, ahead = self._inner, self._path[len(visited) :]
        follows = visitor is not None and self._path[: len(visited)] == visited
        if follows and ahead:
            follows = visitor.consume_tokens(ahead)
        self._inner, self._path = visitor if follows else None, []
        self._masks.clear()
        self._failed.clear()
        return kept, ending

    def _found_forced(self) -> list[int]:
        self._walk(())
        found = [] if self._inner.is_stopped() else self._inner.compute_ff_tokens()
        if self._inner.is_error():
            self._mend()
            return []
        on_the_way = range(min(len(found), MAX_TREE))  # they will be asked for, and to come back takes a copy
        self.masks([tuple(found[:count]) for count in on_the_way])
        then_complete = len(found) < MAX_TREE and self._walk(tuple(found)) and self._inner.is_stopped()
        return [*found, self._ends[0]] if then_complete and self._ends else list(found)

    def _step(self, token: int) -> Ending | None:
        if token in self._ends and self._may_end():
            return "stop"
        if not self._take(token):
            return "error"
        self._path.append(token)
        return "stop" if not self._ends and self._inner.is_stopped() else None

    def _follow_forced(self, tokens: Sequence[int]) -> None:
        count = len(tokens)
        known = self._forced is not None and len(self._forced) > count and self._forced[:count] == list(tokens)
        self._forced = self._forced[count:] if known and self._forced else None

    # the library's matcher --------------------------------------------------------------------------------------------

    def _walk(self, path: Path) -> bool:
        """Stand after ``path``; False where the grammar refuses it."""
        shared = 0
        while shared < min(len(path), len(self._path)) and path[shared] == self._path[shared]:
            shared += 1
        if self._inner is None or shared < len(self._path):
            self._begin()
        for token in path[len(self._path) :]:
            if not self._take(token):
                return False
            self._path.append(token)
        return True

    def _begin(self) -> None:
        """Stand at the text again. By a copy, not by the library's rollback.

        llguidance 1.9.1 keeps its last mask through a rollback, and returns it for a state that only looks the same:
        behind as many lexemes, in the same state of the lexer (``bias_cache`` in its earley/parser.rs).
        """
        self._inner = self._at_text.deep_copy()
        self._path = []

    def _take(self, token: int) -> bool:
        if self._inner.is_stopped():  # complete, or beyond repair
            return False
        taken = bool(self._inner.try_consume_tokens([token]) == 1)
        if self._inner.is_error():
            self._failed.add((*self._path, token))
            self._mend()
            return False
        return taken

    def _may_end(self) -> bool:
        """Whether the text is complete here."""
        return bool(not self._inner.is_error() and (self._inner.is_stopped() or self._inner.is_accepting()))

    def _mask(self) -> Words | None:
        words = np.zeros_like(self._end_words)
        complete = self._inner.is_stopped()
        if not complete:
            self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._inner.is_error():
            self._failed.add(tuple(self._path))
            self._mend()
            return None
        place, bit = self._vocab_size // 32, np.uint32(1 << self._vocab_size % 32).astype(np.int32)
        may_end = complete or bool(words[place] & bit)
        words[place] &= ~bit
        early = len(self._text) + len(self._path) < self._min_tokens
        if early:  # an end may be a piece of text, too
            others = words & ~self._end_words
            words = others if others.any() else words
        if may_end and not ((early or self._goes_on) and words.any()):
            words |= self._end_words
        return words if words.any() else None

    def _mend(self) -> None:
        """Begin anew at the committed text: after an error the library's matcher does nothing more."""
        self._at_text = self.compiled.start.deep_copy()
        if self._text:
            self._at_text.consume_tokens(self._text)
        self._begin()
