"""Grammars are checked in a process that nothing survives but the next check."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from decoding.errors import RequestError
from decoding.request import Grammar
from server.errors import UnavailableError
from server.grammar_worker import GrammarWorker
from tests.engines import ROOT

GOOD = Grammar("regex", "[a-z]+")
PATIENT = 60.0  # seconds, on a machine that has other things to do


def using(use: Callable[[GrammarWorker], Awaitable[None]], **limits: float) -> None:
    """Run ``use`` with a worker, and close that."""

    async def run() -> None:
        worker = GrammarWorker(ROOT / "demo/target", lambda: 8192, **{"seconds": PATIENT, **limits})  # type: ignore[arg-type]
        try:
            await use(worker)
        finally:
            await worker.close()

    asyncio.run(run())


async def refusal(worker: GrammarWorker, grammar: Grammar) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await worker.check(grammar, "response_format")
    assert caught.value.param == "response_format"
    return caught.value


def test_good_and_bad_ones_side_by_side() -> None:
    async def use(worker: GrammarWorker) -> None:
        bad = [Grammar("regex", "(" * count) for count in range(1, 7)]
        good = [Grammar("regex", "a" * count) for count in range(1, 7)]
        refusals, *_ = await asyncio.gather(
            asyncio.gather(*[refusal(worker, each) for each in bad]), *[worker.check(each) for each in good]
        )
        assert {error.code for error in refusals} == {"invalid_grammar"}
        await worker.check(Grammar("json_schema", '{"type": "object"}'))
        assert (await refusal(worker, Grammar("json_schema", '{"type": "foo"}'))).code == "invalid_grammar"
        assert (await refusal(worker, Grammar("regex", "\ud800"))).code == "invalid_grammar"

    using(use)


def test_what_takes_too_long_is_killed() -> None:
    async def use(worker: GrammarWorker) -> None:
        for _ in range(3):
            error = await refusal(worker, GOOD)
            assert error.code == "grammar_too_complex"
            assert "takes longer" in error.message

    using(use, seconds=0.0)


def test_what_takes_too_much_memory_ends_with_its_process() -> None:
    large = Grammar("regex", "(" + "|".join(f"{word:x}" for word in range(30_000)) + ")")

    async def use(worker: GrammarWorker) -> None:
        error = await refusal(worker, large)
        assert error.code == "grammar_too_complex"
        assert "memory" in error.message

    using(use, memory=2**20)
    using(lambda worker: worker.check(large))


def test_verdicts_are_remembered_and_a_lost_process_is_replaced() -> None:
    async def use(worker: GrammarWorker) -> None:
        await worker.check(GOOD)
        assert worker._process is not None
        first = worker._process
        os.kill(first.pid, signal.SIGKILL)
        await first.wait()
        await worker.check(GOOD)
        assert worker._process is first, "that was known"
        await worker.check(Grammar("regex", "[A-Z]+"))
        assert worker._process is not first

    using(use)


def test_what_was_asked_of_a_process_that_ends_is_answered() -> None:
    async def use(worker: GrammarWorker) -> None:
        await worker.check(GOOD)
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGSTOP)  # it will not answer
        asked = asyncio.create_task(worker.check(Grammar("regex", "x")))
        await asyncio.sleep(0.05)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await asked

    using(use)


def test_it_ends_with_its_parent() -> None:
    async def use(worker: GrammarWorker) -> None:
        await worker.check(GOOD)
        assert worker._process is not None
        assert worker._process.stdin is not None
        worker._process.stdin.close()
        assert await asyncio.wait_for(worker._process.wait(), PATIENT) == 0

    using(use)
