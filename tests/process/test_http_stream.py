"""The benchmark of streams, with its real processes: short, and judged by what must hold at any speed."""

from __future__ import annotations

import os

import pytest

from benchmarks.http_stream import measure, parse

pytestmark = pytest.mark.process


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the HTTP process and the rest need a core each")
def test_every_token_of_every_stream_is_accounted_for() -> None:
    args = parse(["--streams", "8", "--seconds", "0.5"])
    found = measure(4000.0, args)  # it raises when a stream breaks off or has another text
    assert found.asked == 4000.0
    assert found.streamed > 0
    assert found.tokens_per_chunk >= args.tokens
    assert 0 < found.median <= found.p90 <= found.p99 <= found.longest
    assert 0 < found.cpu < 1.1
