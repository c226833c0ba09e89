"""Whether a grammar can be served: compiled, before the engine sees it, in a process that is killed if it takes long.

``await worker.check(grammar)`` returns, or raises the RequestError for the client. The engine compiles the same text
again, which by then is known to be quick and small.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from decoding.errors import RequestError
from decoding.request import Grammar
from server.errors import UnavailableError
from server.log import Relay
from server.observation import LogFormat

SECONDS = 1.2  # for one grammar: with all else, a client that sends a bad one has its answer in 2
MEMORY = 2**30  # bytes of one grammar's process, those of the tokenizer included
REMEMBERED = 1024  # verdicts that are known without asking again
WAITING = 64  # grammars that are being checked or wait for it
LOAD_SECONDS = 60.0

log = logging.getLogger("saccade")

Verdict = tuple[str | None, str]  # RequestError's code, None for a good grammar; its message


class GrammarCheck(Protocol):
    """What the routes ask."""

    async def check(self, grammar: Grammar, param: str = "grammar") -> None:
        """Return if the grammar can be served.

        Args:
            param: the request's field that the grammar came in, for the error.

        Raises:
            RequestError: code ``invalid_grammar`` or ``grammar_too_complex``.
            UnavailableError: too many grammars wait to be checked.
        """
        ...


class SizeCheck:
    """Looks at the size alone: for engines in this process, whose requests are one's own."""

    async def check(self, grammar: Grammar, param: str = "grammar") -> None:
        """See ``GrammarCheck``."""
        try:
            grammar.validate()
        except RequestError as error:
            raise RequestError(error.message, param=param, code=error.code) from None


class GrammarWorker(SizeCheck):
    """Checks grammars for one model in a process of its own, which starts with the first of them.

    Args:
        folder: of the tokenizer.
        vocab_size: gives the number of ids that can be drawn.
        seconds: for one grammar, on the clock; it is killed then.
        memory: bytes for one grammar, likewise.
        log_format: of what the process writes.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: Callable[[], int],
        *,
        seconds: float = SECONDS,
        memory: int = MEMORY,
        log_format: LogFormat = "text",
    ) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._memory = memory
        self._log_format = log_format
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Verdict]] = {}
        self._starting = asyncio.Lock()
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def check(self, grammar: Grammar, param: str = "grammar") -> None:
        """See ``GrammarCheck``."""
        await super().check(grammar, param)
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.source}".encode()).digest()
        verdict = self._known.get(key)
        if verdict is None:
            verdict = await self._ask(grammar)
            self._remember(key, verdict)
        else:
            self._known.move_to_end(key)
        code, message = verdict
        if code is not None:
            raise RequestError(message, param=param, code=code)

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        if verdict[0] == "grammar_too_complex":  # that may be the machine's fault: it was busy
            return
        self._known[key] = verdict
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    async def close(self) -> None:
        """End the process; nothing is checked any more."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _ask(self, grammar: Grammar) -> Verdict:
        if len(self._asked) >= WAITING:
            raise UnavailableError("Too many grammars are waiting to be checked; try again soon.")
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            process = await self._running()
            assert process.stdin is not None
            request = {"id": number, "kind": grammar.kind, "source": grammar.source}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
            verdict: Verdict = await answer
            return verdict
        except (BrokenPipeError, ConnectionResetError) as error:
            raise UnavailableError("Grammars cannot be checked at the moment; try again soon.") from error
        finally:
            self._asked.pop(number, None)

    async def _running(self) -> Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await self._start()
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _start(self) -> Process:
        limits = ["--vocab-size", str(self._vocab_size()), "--seconds", str(self._seconds)]
        relay = Relay("saccade.grammars") if self._log_format == "json" else None
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.grammar_child", "--tokenizer", str(self._folder)),
            *(*limits, "--memory", str(self._memory)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=None if relay is None else relay.fileno(),
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # it forks, and threads do not survive that
        )
        if relay is not None:
            relay.handed_over()
        assert process.stdout is not None
        ready = b""
        with contextlib.suppress(TimeoutError):
            ready = await asyncio.wait_for(process.stdout.readline(), LOAD_SECONDS)
        if not ready:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            log.error("the process that checks grammars did not start; its log is above")
            raise UnavailableError("Grammars cannot be checked at the moment; try again soon.")
        return process

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            future = self._asked.get(answer["id"])
            if future is not None and not future.done():  # its client may have left
                future.set_result((answer["code"], answer["message"]))
        for future in self._asked.values():  # the process ended, and with it what it was asked
            if not future.done():
                future.set_exception(UnavailableError("Grammars cannot be checked at the moment; try again soon."))
