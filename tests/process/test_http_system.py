"""Our own server, measured over HTTP."""

from __future__ import annotations

from contextlib import closing

import pytest

from benchmarks.http_systems import HttpSystem
from benchmarks.measure import Case, Task

pytestmark = pytest.mark.process

PLAIN = ("demo/target", "--threads", "1", "--kv-cache-memory", "64MiB")
CASES = (Case(0, (300, 301, 302), seed=1), Case(1, (400, 401), seed=2))


def test_texts_are_streamed_at_once_and_do_not_depend_on_drafts() -> None:
    task = Task(0, 1.0, CASES, tokens=24)
    texts = []
    for drafters in ((), ("--speculate", "ngram")):
        with closing(HttpSystem("http", (*PLAIN, *drafters), batch=2)) as system:
            run = system.run(task)
        texts.append(run.texts)
        assert (run.tokens, run.prompts) == (48, (0, 1))
        assert 0 < run.steps <= 48
        assert run.forward_seconds
        assert list(run.by_drafter) == [name for name in drafters if name == "ngram"]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 2
