"""The benchmark of streams: what it makes of what came, and when."""

from __future__ import annotations

import json

import msgspec
import pytest

from benchmarks.http_stream import latencies, parse, summary
from benchmarks.paced_engine import Pace, PacedEngine
from benchmarks.stream_reader import Stream, post
from decoding.request import GenerateRequest, SamplingParams

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    payload = json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": None}]}, separators=(",", ":"))
    return f"data: {payload}\n\n".encode()


def stream(*pieces: tuple[int, bytes]) -> Stream:
    found = Stream()
    for time, piece in ((0, HEAD), *pieces, (99, b"data: [DONE]\n\n")):
        found.times.append(time)
        found.pieces.append(piece)
    return found


def test_a_chunk_has_come_when_its_last_byte_has() -> None:
    whole = event("abab")
    assert stream((10, whole), (20, whole[:7]), (30, whole[7:-1]), (40, whole[-1:])).texts() == [(10, 4), (40, 4)]


def test_events_merged_into_one_chunk_are_each_as_late_as_it() -> None:
    came = stream((10, event("abab")), (40, event("abababab")))
    assert list(latencies([5, 15, 25], came, 4)) == [(0, 5), (1, 25), (2, 15)]


@pytest.mark.parametrize("texts", [("abab",), ("abab", "abab", "abab"), ("abab", "aba")])
def test_a_text_that_is_not_that_of_the_events_is_an_error(texts: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="characters"):
        list(latencies([5, 15], stream(*[(20, event(text)) for text in texts]), 4))


@pytest.mark.parametrize("end", [b"", b'data: {"error":{"message":"x"}}\n\n'])
def test_a_stream_that_breaks_off_is_an_error(end: bytes) -> None:
    broken = Stream()
    broken.times, broken.pieces = [0, 1], [HEAD, event("abab") + end]
    with pytest.raises(RuntimeError, match="broke off"):
        broken.texts()


def test_summary() -> None:
    sent = [n * 1_000_000 for n in range(20)]
    streams = [stream(*[(at + 500_000 * (1 + late), event("return")) for at in sent]) for late in (0, 2)]
    for each in streams:
        each.times[-1] = 20_000_000
    found = summary(1000.0, sent, streams, tokens=1, cpu_seconds=0.005)
    assert (found.median, found.longest) == (pytest.approx(1.0), pytest.approx(1.5))
    assert found.tokens_per_chunk == 1.0
    assert found.streamed == pytest.approx(40 / 0.0205)
    assert found.cpu == pytest.approx(0.005 / 0.0205)


def test_the_engine_begins_when_all_are_there_and_tells_when_its_steps_were(tmp_path) -> None:  # type: ignore[no-untyped-def]
    log = tmp_path / "times.json"
    engine = PacedEngine(Pace(rows=2, tokens=3, rate=0.0, token_id=9, core=0, log=str(log)))
    engine.submit(GenerateRequest("a", (1,), SamplingParams(max_tokens=6)))
    assert engine.step() == []
    engine.submit(GenerateRequest("b", (1,), SamplingParams(max_tokens=6)))
    steps = [engine.step(), engine.step()]
    assert [[(e.request_id, e.token_ids, e.finish_reason) for e in step] for step in steps] == [
        [("a", (9, 9, 9), None), ("b", (9, 9, 9), None)],
        [("a", (9, 9, 9), "length"), ("b", (9, 9, 9), "length")],
    ]
    assert not engine.has_work
    assert len(msgspec.json.decode(log.read_bytes())) == 2


def test_a_request_and_a_command_line() -> None:
    head, body = post("/p", b"{}").split(b"\r\n\r\n")
    assert head.startswith(b"POST /p HTTP/1.1\r\n")
    assert (b"Content-Length: 2" in head, body) == (True, b"{}")
    with pytest.raises(SystemExit):
        parse(["--profile", "x", "--rates", "1", "2"])
