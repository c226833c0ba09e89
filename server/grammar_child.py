"""Checks grammars in processes that can be killed: ``python -m server.grammar_child``, started by grammar_worker.py.

It loads the tokenizer once and then forks for every grammar: what a grammar eats of time, memory or stack ends with its
own fork, and the next one finds everything as it was. Lines of JSON come in on standard input, such as
``{"id": 1, "kind": "regex", "source": "a+"}``. They go out on standard output, in the order in which they are done:
``{"id": 1, "code": null, "message": ""}``, or a RequestError's code and message. It ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import selectors
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from decoding.errors import RequestError
from decoding.grammar.compiler import GrammarCompiler
from decoding.request import Grammar
from decoding.text import Tokenizer

AT_ONCE = 2  # forks that work at a time
STACK_BYTES = 4 * 2**20  # less than the engine's thread has, which compiles the same grammar again
MASK_SECONDS = 0.03  # every token of the text would cost as much, and so would those of other requests beside it
TOO_LONG = "The grammar is too complex: compiling it takes longer than this server allows. Simplify it."
TOO_SLOW = "The grammar is too complex: to say what may follow takes too long at every token. Simplify it."
TOO_BIG = "The grammar is too complex: compiling it takes more memory than this server allows. Simplify it."


@dataclass
class _Fork:
    """One grammar's process, and what it has answered so far."""

    number: int  # of the request
    process: int
    pipe: int
    until: float  # monotonic
    answer: bytes = b""


@dataclass
class Checker:
    """The loop: requests in, forks, answers out."""

    compiler: GrammarCompiler
    seconds: float
    memory: int
    waiting: list[dict[str, Any]] = field(default_factory=list)
    forks: dict[int, _Fork] = field(default_factory=dict)  # by pipe
    _input: bytes = b""

    def run(self) -> None:
        """Answer until the input ends; then nobody waits for what is under way."""
        selector = selectors.DefaultSelector()
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(self._patience()):
                if key.fd == 0:
                    if not self._read():
                        return self._end()
                elif not self._hear(self.forks[key.fd]):
                    selector.unregister(key.fd)
                    self._finish(self.forks[key.fd])
            for fork in [each for each in self.forks.values() if time.monotonic() >= each.until]:
                selector.unregister(fork.pipe)
                self._finish(fork, TOO_LONG)
            while self.waiting and len(self.forks) < AT_ONCE:
                selector.register(self._begin(self.waiting.pop(0)).pipe, selectors.EVENT_READ)

    def _patience(self) -> float | None:
        if not self.forks:
            return None
        return max(0.0, min(fork.until for fork in self.forks.values()) - time.monotonic())

    def _read(self) -> bool:
        data = os.read(0, 2**20)
        *lines, self._input = (self._input + data).split(b"\n")
        self.waiting += [json.loads(line) for line in lines]
        return bool(data)

    def _begin(self, request: dict[str, Any]) -> _Fork:
        pipe, far_end = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(pipe)
            _answer(self.compiler, Grammar(request["kind"], request["source"]), far_end, self.seconds, self.memory)
        os.close(far_end)
        fork = self.forks[pipe] = _Fork(request["id"], process, pipe, time.monotonic() + self.seconds)
        return fork

    @staticmethod
    def _hear(fork: _Fork) -> bool:
        data = os.read(fork.pipe, 2**16)
        fork.answer += data
        return bool(data)

    def _finish(self, fork: _Fork, message: str | None = None) -> None:
        """The fork's answer, or the message for it if it was too slow; one that died without a word ate too much."""
        os.close(fork.pipe)
        del self.forks[fork.pipe]
        os.kill(fork.process, signal.SIGKILL)  # it may be dead, but it is not forgotten yet
        os.waitpid(fork.process, 0)
        if message is None and fork.answer.endswith(b"\n"):
            verdict = json.loads(fork.answer)
        else:
            verdict = {"code": "grammar_too_complex", "message": message or TOO_BIG}
        os.write(1, json.dumps({"id": fork.number, **verdict}).encode() + b"\n")

    def _end(self) -> None:
        for fork in self.forks.values():
            os.kill(fork.process, signal.SIGKILL)


def _answer(compiler: GrammarCompiler, grammar: Grammar, pipe: int, seconds: float, memory: int) -> NoReturn:
    """Compile in this process, within limits, answer, and end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    _limit(resource.RLIMIT_DATA, memory)
    _limit(resource.RLIMIT_CPU, int(seconds) + 2)
    code: str | None = None
    message = ""
    try:
        if compiler.compile(grammar).mask_seconds() > MASK_SECONDS:
            code, message = "grammar_too_complex", TOO_SLOW
    except RequestError as error:
        code, message = error.code, error.message
    except MemoryError:
        code, message = "grammar_too_complex", TOO_BIG
    os.write(pipe, json.dumps({"code": code, "message": message}).encode() + b"\n")
    os._exit(0)


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main(argv: list[str] | None = None) -> int:
    """Check grammars until the input ends."""
    parser = argparse.ArgumentParser(prog="server.grammar_child", allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--memory", type=int, required=True)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    tokenizer = Tokenizer.load(args.tokenizer)
    compiler = GrammarCompiler(tokenizer, min(args.vocab_size, tokenizer.vocab_size), ())
    compiler.prepare()
    os.write(1, b'{"ready": true}\n')
    Checker(compiler, args.seconds, args.memory).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
