"""A grammar that begins behind a model's reasoning: what it thinks is free, what it says is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from decoding.grammar.compiler import Compiled
from decoding.grammar.matcher import Ending, Matcher, Path, Words
from decoding.request import Reasoning

State = Literal["undecided", "thinking", "saying"]


class LateMatcher(Matcher):
    """Of a sequence that may think first. While it thinks, any token may come but an end, since nothing is said yet.

    Where it may begin to think, or say at once what the grammar says, the first token decides.

    Args:
        reasoning: the tokens around what is thought.
        min_tokens: of what it says; what it thinks does not count, so that a mask depends on what is said alone.
    """

    def __init__(
        self,
        compiled: Compiled,
        ends: tuple[int, ...],
        reasoning: Reasoning,
        min_tokens: int = 0,
        goes_on: bool = False,
    ) -> None:
        super().__init__(compiled, ends, min_tokens, goes_on)
        self._reasoning = reasoning
        self._state: State = "thinking" if reasoning.open is None else "undecided"
        self._free = ~self._end_words | _bit(reasoning.close, len(self._end_words))

    def resume(self, tokens: list[int]) -> None:
        """See ``Matcher.resume``."""
        self._state, thought = self._read(tokens)
        if self._state == "saying":
            super().resume(tokens[thought:])

    def masks(self, paths: Sequence[Path]) -> list[Words | None]:
        """See ``Matcher.masks``."""
        if self._state == "saying":
            return super().masks(paths)
        read = [self._read(path) for path in paths]
        saying = [path[n:] for path, (state, n) in zip(paths, read, strict=True) if state != "thinking"]
        masks = iter(super().masks(saying))
        return [self._free if state == "thinking" else self._opening(next(masks), state) for state, _ in read]

    def allows(self, path: Path) -> bool:
        """See ``Matcher.allows``."""
        state, thought = self._read(path)
        if state == "thinking":
            return path[-1] not in self._ends
        return thought == len(path) or super().allows(path[thought:])

    def forced(self) -> list[int]:
        """See ``Matcher.forced``."""
        return super().forced() if self._state == "saying" else []

    def commit(self, tokens: Sequence[int]) -> tuple[int, Ending | None]:
        """See ``Matcher.commit``."""
        if self._state == "saying":
            return super().commit(tokens)
        ended = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        self._state, thought = self._read(tokens[: ended + 1])
        if ended < thought:
            return ended + 1, "stop"
        said, ending = super().commit(tokens[thought:]) if thought < len(tokens) else (0, None)
        return thought + said, ending

    def _read(self, tokens: Sequence[int]) -> tuple[State, int]:
        """What it does behind these tokens, and how many of them come before what the grammar says."""
        state = self._state
        for place, token in enumerate(tokens):
            if state == "saying" or (state == "undecided" and token != self._reasoning.open):
                return "saying", place
            state = "saying" if state == "thinking" and token == self._reasoning.close else "thinking"
        return state, len(tokens)

    def _opening(self, words: Words | None, state: State) -> Words | None:
        """A mask at the grammar's beginning, where it may begin to think as well if it is undecided."""
        opening = self._reasoning.open
        if words is None or state != "undecided" or opening is None:
            return words
        return words | _bit(opening, len(words))


def _bit(token: int, words: int) -> Words:
    """A mask with one id."""
    mask = np.zeros(words, dtype=np.int32)
    mask[token // 32] = np.uint32(1 << token % 32).astype(np.int32)
    return mask
