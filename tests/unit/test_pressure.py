"""The judges of overload and soak find what they look for, and the client under them tells ends apart."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import overload, soak
from benchmarks.raw_client import Outcome, ask
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.fake_client import Death, Line, Pause
from tests.api.harness import ids, live, saying

GOOD = overload.Report(
    capacity=100.0,
    offered=400.0,
    goodput=95.0,
    refused=900,
    refused_p50=0.002,
    refused_p99=0.02,
    admitted_p50=0.2,
    admitted_p99=0.4,
    bound=0.5,
    ends={"done": 300, "429": 900},
)
AFTER = {
    "saccade_pages_free": 60.0,
    "saccade_pages_cached": 4.0,
    "saccade_pages_total": 64.0,
    "saccade_running": 0.0,
    "saccade_waiting": 0.0,
}
MIB = 2**20


def test_an_overload_that_is_borne_well_has_no_faults() -> None:
    assert GOOD.faults() == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"goodput": 80.0}, "goodput is 80.0/s"),
        ({"refused_p99": 0.3}, "300 ms"),
        ({"admitted_p99": 0.6}, "0.60 s"),
        ({"ends": {"done": 1, "429": 2, "cut": 1}}, "{'cut': 1}"),
    ],
)
def test_each_fault_of_an_overload_is_found(change: dict[str, Any], part: str) -> None:
    (fault,) = replace(GOOD, **change).faults()
    assert part in fault


def samples(residents: list[int], descriptors: list[int]) -> list[soak.Sample]:
    pairs = zip(residents, descriptors, strict=True)
    return [soak.Sample(float(i), "http", size * MIB, count) for i, (size, count) in enumerate(pairs)]


FLAT = samples([70] * 4 + [100] * 12, [30] * 16)  # the first quarter is another story


def test_a_flat_soak_has_no_faults() -> None:
    assert soak.faults(FLAT, Counter(done=5, left=2, **{"400": 1}), AFTER, "INFO: ready\n") == []


@pytest.mark.parametrize(
    ("found", "ends", "after", "log", "part"),
    [
        (samples([100 + 2 * i for i in range(16)], [30] * 16), {}, {}, "", "memory grew from"),
        (samples([100] * 16, [30 + 4 * i for i in range(16)]), {}, {}, "", "descriptors grew from"),
        (FLAT, {"500": 1}, {}, "", "1 requests ended as '500'"),
        (FLAT, {"cut": 2}, {}, "", "2 requests ended as 'cut'"),
        (FLAT, {}, {"saccade_pages_free": 59.0}, "", "pages are missing"),
        (FLAT, {}, {"saccade_waiting": 1.0}, "", "left over"),
        (FLAT, {}, {}, "Traceback (most recent call last)", "the log has errors"),
    ],
)
def test_each_fault_of_a_soak_is_found(
    found: list[soak.Sample], ends: dict[str, int], after: dict[str, float], log: str, part: str
) -> None:
    (fault,) = soak.faults(found, Counter(ends), AFTER | after, log)
    assert part in fault


def test_the_mix_has_everything_in_it() -> None:
    dice = random.Random(1)
    asked = [soak.request(dice) for _ in range(400)]
    for field in ("logprobs", "stop", "speculation"):
        assert 0 < sum(field in body for body, _ in asked) < 200
    assert {body["stream"] for body, _ in asked} == {True, False}
    assert 50 < sum(leave is not None for _, leave in asked) < 150


def talking(*lines: Line) -> Any:
    def script(request: GenerateRequest) -> Iterable[Line]:
        yield TokenEvent(request.request_id, 0, ids("a"))
        yield from lines

    return script


def outcome(url: str, body: dict[str, Any], **how: Any) -> Outcome:
    return asyncio.run(ask(int(url.rpartition(":")[2]), {"prompt": "x", **body}, **how))


@pytest.mark.parametrize("stream", [True, False])
def test_ends_are_told_apart(stream: bool) -> None:
    with live(saying("a", " b")) as url:
        done = outcome(url, {"stream": stream})
        assert (done.end, done.status, done.answered) == ("done", 200, True)
        assert 0 < done.first_seconds <= done.seconds
        wrong = outcome(url, {"stream": stream, "temperature": -1})
        assert (wrong.end, wrong.status) == ("status", 400)
    with live(talking(Pause(30))) as url:
        assert outcome(url, {"stream": stream}, leave=0.2).end == "left"
        assert outcome(url, {"stream": stream}, seconds=0.2).end == "cut"
    with live(talking(Death(), Pause(1))) as url:
        assert outcome(url, {"stream": stream}).end == ("error" if stream else "status")


def test_a_connection_that_breaks_or_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def half() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(65536)
                accepted.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {}\n\n")

        thread = threading.Thread(target=half)
        thread.start()
        assert outcome(f"http://x:{port}", {"stream": True}).end == "cut"
        thread.join()
    assert outcome(f"http://x:{port}", {}).end == "refused"
