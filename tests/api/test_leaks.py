"""Requests that come and go at any moment leave no object behind in the HTTP process."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.fake_client import Line, Pause
from server.limits import Limits
from server.settings import ServerSettings
from tests.api.harness import fake, ids, live
from tests.process.faults import come_and_go

SETTINGS = ServerSettings(("demo",), limits=Limits(header_timeout=1.0, body_timeout=1.0, write_timeout=1.0))
BODIES: list[dict[str, Any]] = [
    {"prompt": "x", "stream": True},
    {"prompt": "x"},
    {"prompt": ["x", "y"], "n": 2, "stream": True},
    {"prompt": ["x", "y"], "n": 2},
    {"prompt": 5},
]


def talking(request: GenerateRequest) -> Iterable[Line]:
    for step in range(20):
        for choice in range(request.params.n):
            last = "length" if step == 19 else None
            yield TokenEvent(request.request_id, choice, ids("word "), finish_reason=last)  # type: ignore[arg-type]
        yield Pause(0.01)


def alive() -> Counter[str]:
    """Objects of ours, of the HTTP server below, and tasks."""
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    ours = [kind for kind in kinds if str(kind.__module__).startswith(("server.", "uvicorn.")) or kind is asyncio.Task]
    return Counter(kind.__name__ for kind in ours)


def settles_at(before: Counter[str], seconds: float = 20.0) -> Counter[str]:
    """What there is more than before, once nothing more goes away."""
    until = time.monotonic() + seconds
    while (more := alive() - before) and time.monotonic() < until:
        time.sleep(0.2)
    return more


def test_nothing_is_left_of_requests_that_come_and_go() -> None:
    dice = random.Random(5)
    engine = fake(talking)
    with live(engine, SETTINGS) as url:
        for body in BODIES:  # what is made at the first use stays
            httpx.post(f"{url}/v1/completions", json=body)
        time.sleep(1.5)  # the connections of that are gone
        before = alive()
        with ThreadPoolExecutor(16) as pool:
            for _ in range(80):
                pool.submit(come_and_go, url, random.Random(dice.random()), dice.choice(BODIES))
        assert settles_at(before) == {}
        engine.requests.clear()
        assert httpx.post(f"{url}/v1/completions", json=BODIES[1]).status_code == 200
