"""The window of Lookahead decoding: several guesses at the same stretch of text, each a step older than the next.

It has N - 1 rows and W columns. As nodes below the root,

    parent(0, 0) = the root     parent(0, i) = (0, i - 1)     parent(j, i) = (j - 1, i)

so that node (j, i) stands 1 + i + j tokens after the root and sees the root, row 0 up to its own column, and that
column down to itself: the mask of figure 2b of 2402.02057 is a tree. What is drawn after the last row's nodes is the
next row. Column by column, a row's token, those below it and what was drawn are an n-gram (one Jacobi trajectory).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from decoding.drafters.ngram_pool import NgramPool

_WORD = (1 << 64) - 1


class Window:
    """The tokens, and from where they came.

    Args:
        level: N; the window has N - 1 rows.
        width: W.
        text: tokens of which random ones fill what is not drawn yet, as the paper's code does.
        seed: of their choice.
    """

    def __init__(self, level: int, width: int, text: np.ndarray, seed: int) -> None:
        self.width = width
        self._level = level
        self._text = text
        self._luck = seed
        self.rows = [self._any(width) for _ in range(level - 1)]
        self._drawn = [0] * width  # rows of each column that were drawn, from the last one up

    @property
    def nodes(self) -> int:
        """Of its tree at the most: equal tokens in equal places are one node."""
        return self.width * (self._level - 1)

    @property
    def depth(self) -> int:
        """Of its tree."""
        return self.width + self._level - 2

    def advance(self, drawn: list[int], pool: NgramPool) -> None:
        """The n-grams go to the pool, rows move up, and the tokens drawn after the last one [W] become the new one.

        Every place is now one token nearer to the root that it was seen from: the window of a text that has grown by
        one token.
        """
        for column, token in enumerate(drawn):
            if self._drawn[column] >= self._level - 2:  # all below its first token was drawn
                first, *tail = (row[column] for row in self.rows)
                pool.add(first, (*tail, token))
        self.rows = [*self.rows[1:], drawn]
        self._drawn = [count + 1 for count in self._drawn]

    def slide(self, count: int) -> None:
        """The text has grown by so many more tokens. What was guessed for a place stays a guess at that place; columns
        that the text has overtaken begin anew.
        """
        gone = min(count, self.width)
        self.rows = [row[gone:] + self._any(gone) for row in self.rows]
        self._drawn = self._drawn[gone:] + [0] * gone

    def place(self, node_of: Callable[[int, int], int | None]) -> list[int] | None:
        """[W] columns of the last row's nodes in a tree; None where there is not a node for each token.

        Args:
            node_of: (column of the parent, token) -> column of the node, or None.
        """
        above: list[int] = []
        for number, row in enumerate(self.rows):
            here: list[int] = []
            for column, token in enumerate(row):
                parent = above[column] if number else here[-1] if column else 0
                node = node_of(parent, token)
                if node is None:
                    return None
                here.append(node)
            above = here
        return above

    def _any(self, count: int) -> list[int]:
        """Random tokens of the text."""
        return [int(self._text[self._bits() * len(self._text) >> 32]) for _ in range(count)]

    def _bits(self) -> int:
        """32 random bits: the upper ones of SplitMix64 (Steele et al., OOPSLA 2014)."""
        self._luck = (self._luck + 0x9E3779B97F4A7C15) & _WORD
        mixed = (self._luck ^ self._luck >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
        return (mixed ^ mixed >> 31) >> 32
