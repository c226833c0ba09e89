"""Requests whose grammar is being compiled: they stand in the scheduler's queue, and are passed over until it is."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, wait

from decoding.errors import RequestError
from decoding.grammar.compiler import BackgroundCompiler, Compiled, outcome
from decoding.grammar.late import LateMatcher
from decoding.grammar.matcher import Matcher
from decoding.request import Grammar
from decoding.sequence import Sequence, SequenceId

PATIENCE = 0.02  # seconds that an engine with nothing else to do waits at a time


class GrammarQueue:
    """Gives sequences their matchers.

    Args:
        eos_ids: ids that end a text.
    """

    def __init__(self, compiler: BackgroundCompiler, eos_ids: tuple[int, ...]) -> None:
        self._compiler = compiler
        self._eos_ids = eos_ids
        self._waiting: dict[SequenceId, tuple[Sequence, Future[Compiled]]] = {}
        self._wanted: Counter[Future[Compiled]] = Counter()  # how many of these wait for it

    def warm(self) -> None:
        """Do what is the same for all grammars: a second or two for a large vocabulary."""
        self._compiler.warm()

    def require(self, grammar: Grammar) -> None:
        """Compile a grammar and wait for it.

        Raises:
            RequestError: it cannot be compiled.
        """
        outcome(self._compiler.start(grammar))

    def add(self, sequence: Sequence, spent: Compiled | None = None) -> None:
        """Compile what the sequence needs, if it needs anything.

        Args:
            spent: the sequence comes back, because this one's texts have come to its limits.
        """
        grammar = sequence.request.grammar
        if grammar is not None:
            future = self._compiler.start(grammar, spent)
            self._waiting[sequence.id] = (sequence, future)
            self._wanted[future] += 1

    def settle(self, *, idle: bool) -> list[tuple[Sequence, RequestError]]:
        """Hand out what is ready; the sequences whose grammar cannot be compiled, and why.

        Args:
            idle: there is nothing else to do, so this may take a moment.
        """
        if not self._waiting:
            return []
        if idle:
            wait([future for _, future in self._waiting.values()], PATIENCE, return_when="FIRST_COMPLETED")
        failed = []
        for sequence, future in [each for each in self._waiting.values() if each[1].done()]:
            self._leave(sequence)
            try:
                sequence.matcher = self._matcher(sequence, outcome(future))
            except RequestError as error:
                failed.append((sequence, error))
        return failed

    def forget(self, sequence: Sequence, error_code: str | None) -> None:
        """The sequence ended. If by the limits of its grammar, the next one begins anew.

        What nobody waits for any more is not compiled: clients that ask and leave would keep the others waiting.
        """
        grammar = sequence.request.grammar
        if grammar is None:
            return
        if sequence.id in self._waiting:
            future = self._leave(sequence)
            if future not in self._wanted:
                self._compiler.give_up(grammar, future)
        if error_code is not None:
            self._compiler.forget(grammar)

    def close(self) -> None:
        """End what runs beside the engine."""
        self._compiler.close()

    def _leave(self, sequence: Sequence) -> Future[Compiled]:
        """The sequence waits no more; for what it did."""
        _, future = self._waiting.pop(sequence.id)
        self._wanted[future] -= 1
        if not self._wanted[future]:
            del self._wanted[future]
        return future

    def _matcher(self, sequence: Sequence, compiled: Compiled) -> Matcher:
        params = sequence.params
        ends = tuple(dict.fromkeys((*self._eos_ids, *params.stop_token_ids)))
        reasoning, limits = sequence.request.reasoning, (params.min_tokens, params.ignore_eos)
        if reasoning is None:
            matcher = Matcher(compiled, ends, *limits)
        else:
            matcher = LateMatcher(compiled, ends, reasoning, *limits)
        if sequence.generated:
            matcher.resume(sequence.tokens[sequence.prompt_len :].tolist())
        return matcher
