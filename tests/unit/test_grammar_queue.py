"""Who waits for which grammar."""

from __future__ import annotations

import threading

from decoding.grammar.compiler import BackgroundCompiler, Compiled, GrammarCompiler
from decoding.grammar.queue import GrammarQueue
from decoding.request import GenerateRequest, Grammar
from decoding.sequence import Sequence
from tests.engines import EOS, VOCAB, demo_tokenizer
from tests.grammars import regex


class HeldCompiler(GrammarCompiler):
    """Begins the first grammar and stands still until it may go on."""

    def __init__(self) -> None:
        super().__init__(demo_tokenizer(), VOCAB, (EOS,))
        self.begun: list[Grammar] = []
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def compile(self, grammar: Grammar) -> Compiled:
        self.begun.append(grammar)
        self.has_begun.set()
        assert self.may_go_on.wait(30)
        return super().compile(grammar)


def settled(queue: GrammarQueue, sequence: Sequence) -> bool:
    """Whether it gets its matcher; waits for that, for some seconds."""
    for _ in range(500):
        assert not queue.settle(idle=True)
        if sequence.is_ready:
            return True
    return False


def test_what_nobody_waits_for_any_more_is_not_compiled() -> None:
    compiler = HeldCompiler()
    queue = GrammarQueue(BackgroundCompiler(compiler), (EOS,))
    first, left, shared = regex("[AB]"), regex("[CD]"), regex("[EF]")
    grammars = (first, left, left, shared, shared, None, left)
    one, *others, free, again = [
        Sequence(GenerateRequest(f"r{number}", (1,), grammar=grammar), 0, 0) for number, grammar in enumerate(grammars)
    ]
    for sequence in (one, *others, free):
        queue.add(sequence)
    assert compiler.has_begun.wait(30)
    for sequence in (one, *others[:3], free):
        queue.forget(sequence, None)
    compiler.may_go_on.set()
    assert settled(queue, others[3])
    assert compiler.begun == [first, shared]
    queue.add(again)
    assert settled(queue, again)
    assert not any(sequence.is_ready for sequence in (one, *others[:3]))
    queue.close()
