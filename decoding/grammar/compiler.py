"""Compiles grammars for one model, within limits; and in the background, so that no step of the engine waits for it."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from decoding.errors import RequestError
from decoding.grammar.source import brief, library_text, refuse
from decoding.grammar.vocabulary import Vocabulary
from decoding.request import Grammar
from decoding.text import Tokenizer

logger = logging.getLogger("saccade.engine")

# Compiled grammars that wait for the next request of the kind: so many, and of so many characters together. One takes
# up to 10 MB for the states of its lexer (see LIMITS) and up to 80 bytes for each of its characters: 200 MB at worst.
KEPT, KEPT_CHARS = 16, 512 * 2**10
STACK_BYTES = 64 * 2**20  # of the compiling thread: more than what the server's check of the grammar had
# Of one mask, at worst some 15 ms of work; of one grammar, some 10 MB of the lexer's states, which its texts share.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # no states of the parser in messages for clients
}
# Items of one row of the parser: the readings of a text that it follows at one place. JSON has few, but a grammar that
# is free to be ambiguous has as many as it likes, and a token then costs their square: seconds at the 2000 of JSON.
READINGS = {"grammar": 400}
_LIMIT_WORDS = re.compile(r"too (big|large|many|complex|deep)|limit|fuel|exceed", re.IGNORECASE)


@dataclass(frozen=True)
class Compiled:
    """A grammar for one vocabulary."""

    start: Any  # LLMatcher at the beginning of a text; never advanced, always copied
    vocab_size: int

    def mask_seconds(self) -> float:
        """What the first mask takes, once everything for it is there."""
        first = self.start.deep_copy()
        started = time.perf_counter()
        first.compute_bitmask()
        return time.perf_counter() - started


class GrammarCompiler:
    """One model's compiler. Not thread-safe.

    Args:
        vocab_size: ids that can be drawn.
        eos_ids: of them, those that end a text.
        limits: of ``llguidance.LLParserLimits``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        limits: Mapping[str, Any] = LIMITS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._limits = limits
        self._library: Any = None  # LLTokenizer; a second of work for a large vocabulary, when first needed

    def prepare(self) -> None:
        """Do what is the same for all grammars."""
        if self._library is None:
            self._library = LLTokenizer(Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids))

    def compile(self, grammar: Grammar) -> Compiled:
        """The grammar, ready to match; its first mask has been made once.

        Raises:
            RequestError: code ``invalid_grammar`` for what is no grammar, or can never be fulfilled;
                ``grammar_too_complex`` beyond the limits.
        """
        self.prepare()
        text = library_text(grammar)
        start = LLMatcher(self._library, text, log_level=0, limits=self._limits_of(grammar))
        self._check(start)
        first = start.deep_copy()
        first.compute_bitmask()
        self._check(first)
        return Compiled(start, self._vocab_size)

    def _limits_of(self, grammar: Grammar) -> LLParserLimits:
        rows = min(self._limits["max_items_in_row"], READINGS.get(grammar.kind, LIMITS["max_items_in_row"]))
        return LLParserLimits(**{**self._limits, "max_items_in_row": rows})

    @staticmethod
    def _check(matcher: Any) -> None:
        if not matcher.is_error():
            return
        message = brief(matcher.get_error())
        if message.startswith("NoExtension"):  # there is no first token
            refuse("No text can be what the grammar asks for.")
        if _LIMIT_WORDS.search(message):
            refuse(f"The grammar is too complex: {message}", "grammar_too_complex")
        refuse(f"The grammar cannot be compiled: {message}")


def outcome(future: Future[Compiled]) -> Compiled:
    """What compiling came to; waits for it.

    Raises:
        RequestError: it failed. If by a mistake of the library, that is one request's trouble, not the engine's.
    """
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, RequestError):
        logger.error("the grammar library failed", exc_info=error)
        refuse("The grammar cannot be compiled: the library that reads it failed.")
    raise error


class BackgroundCompiler:
    """Compiles in a thread of its own, one grammar after the other, and keeps the last ones."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()

    def warm(self) -> None:
        """Do what is the same for all grammars, and wait for it: later it would hold up the engine.

        If it fails, every grammar will.
        """
        self._executor().submit(self._compiler.prepare).exception()

    def start(self, grammar: Grammar, spent: Compiled | None = None) -> Future[Compiled]:
        """The grammar as soon as it is compiled; the future raises what ``GrammarCompiler.compile`` does.

        Args:
            spent: not this one, whose texts have come to its limits together.
        """
        future = self._kept.get(grammar)
        if future is None or (future.done() and (future.exception() is not None or future.result() is spent)):
            future = self._kept[grammar] = self._executor().submit(self._compiler.compile, grammar)
        self._kept.move_to_end(grammar)
        while len(self._kept) > 1 and (len(self._kept) > KEPT or self._chars() > KEPT_CHARS):
            self._kept.popitem(last=False)
        return future

    def _chars(self) -> int:
        return sum(len(grammar.source) for grammar in self._kept)

    def forget(self, grammar: Grammar) -> None:
        """Compile it anew next time."""
        self._kept.pop(grammar, None)

    def give_up(self, grammar: Grammar, future: Future[Compiled]) -> None:
        """What ``start`` returned is not needed; it is compiled only if that has begun."""
        if future.cancel() and self._kept.get(grammar) is future:
            del self._kept[grammar]

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
            self._kept.clear()

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            before = threading.stack_size(STACK_BYTES)  # holds for threads that start from now on
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            self._thread.submit(self._compiler.prepare)  # its thread starts here
            threading.stack_size(before)
        return self._thread
