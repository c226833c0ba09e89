"""What the load-testing client reads out of streams: times of tokens, counts, failures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.load.events import StreamReader
from benchmarks.load.records import Record


def event(text: str | None = None, **fields: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices, **fields}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def read(*pieces: bytes) -> StreamReader:
    """A reader to which a piece came every second."""
    reader = StreamReader()
    for second, piece in enumerate(pieces):
        reader.feed(piece, float(second))
    return reader


def usage(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 3, "completion_tokens": tokens, **fields}}


def record(reader: StreamReader, scheduled: float = -3.0, sent: float = -1.0) -> Record:
    counted = reader.source not in ("chunks", "usage of the last chunk")
    return Record(
        prompt=0,
        scheduled=scheduled,
        sent=sent,
        ended=10.0,
        arrivals=tuple(reader.arrivals),
        counts=tuple(reader.counts) if counted else None,
        source=reader.source,
        output_tokens=reader.output_tokens,
        prompt_tokens=reader.prompt_tokens,
        wanted=9,
        digest=reader.digest,
        finish_reason=reader.finish_reason,
        drafts=reader.drafts,
    )


def test_time_per_token_is_not_time_per_chunk() -> None:
    reader = read(event("a", **usage(1)), event("bcde", **usage(5)), event("fghi", **usage(9)), DONE)
    assert (reader.source, reader.counts) == ("usage of each chunk", [1, 4, 4])
    assert record(reader).tpot == 2 / 8
    assert record(reader).gaps == [1.0, 1.0]


def test_tokens_of_the_first_chunk_have_no_time_of_their_own() -> None:
    reader = read(event("abcd", **usage(4)), event("e", **usage(5)), event("f", **usage(6)), DONE)
    assert record(reader).tpot == 2 / 2


def test_without_counts_by_chunk_the_whole_number_is_used() -> None:
    reader = read(event("a"), event("bcde"), event(None, **usage(5)), DONE)
    assert (reader.source, reader.output_tokens, reader.prompt_tokens) == ("usage of the last chunk", 5, 3)
    assert record(reader).tpot == 1 / 4


def test_without_any_counts_chunks_are_counted_and_that_is_said() -> None:
    reader = read(event("a"), event("b"), event("c"), DONE)
    assert (reader.source, reader.output_tokens) == ("chunks", None)
    assert record(reader).tokens == 3
    assert record(reader).tpot == 1.0


def test_token_ids_are_counted() -> None:
    def ids(*tokens: int) -> bytes:
        return b"data: " + json.dumps({"choices": [{"text": "x", "token_ids": tokens}]}).encode() + b"\n\n"

    reader = read(ids(1), ids(2, 3, 4), DONE)
    assert (reader.source, reader.counts, reader.output_tokens) == ("token_ids", [1, 3], 4)


def test_timings_of_llama_cpp_are_counted() -> None:
    first = event("a", timings={"predicted_n": 1})
    last = event(None, timings={"predicted_n": 4, "draft_n": 6, "draft_n_accepted": 2})
    reader = read(first, event("bcd", timings={"predicted_n": 4}), last, DONE)
    assert (reader.source, reader.counts) == ("timings", [1, 3])
    assert reader.drafts is not None
    assert (reader.drafts.drafted, reader.drafts.accepted, reader.drafts.steps) == (6, 2, None)


def test_our_account_of_speculation_is_read() -> None:
    account = {"steps": 2, "drafted": 5, "accepted": 3, "by_drafter": {"ngram": {"drafted": 5, "accepted": 3}}}
    reader = read(event("a"), event(None, **usage(5, speculation=account)), DONE)
    assert reader.drafts is not None
    assert (reader.drafts.steps, reader.drafts.by_drafter["ngram"]["accepted"]) == (2, 3)


def test_times_count_from_the_schedule() -> None:
    told = record(read(b": ping\n\n", event("a", **usage(1)), DONE), scheduled=-3.0, sent=-1.0)
    assert (told.ttft, told.ttft_sent, told.latency) == (4.0, 2.0, 13.0)


def test_a_role_without_text_is_no_first_token() -> None:
    def delta(**fields: Any) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": fields}]}).encode() + b"\n\n"

    reader = read(delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="a"), DONE)
    assert reader.arrivals == [1.0, 2.0]
    both = read(delta(reasoning="hm", reasoning_content="hm"), delta(reasoning="hm"), DONE)
    assert both.text == "hmhm", "the two names are of one text"
    assert both.arrivals == [0.0, 1.0]


def test_events_are_put_together_from_pieces_and_split_only_at_line_feeds() -> None:
    whole = event("a\u2028b") + b'data: {"choices":[{"text":"c\xe2\x80\xa8\xc2\x85d"}]}\r\n\r\n' + DONE
    reader = StreamReader()
    for place, byte in enumerate(whole):
        reader.feed(bytes([byte]), float(place))
    assert reader.failure is None
    assert len(reader.arrivals) == 2
    assert reader.digest == read(event("a\u2028bc\u2028\x85d"), DONE).digest


def test_what_comes_at_once_is_one_chunk() -> None:
    reader = read(event("a", **usage(1)) + event("b", **usage(2)), event("c", **usage(3)), DONE)
    assert (reader.arrivals, reader.counts) == ([0.0, 1.0], [2, 1])


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ((event("a"), event(None, error={"message": "the engine is gone"}), DONE), "error in stream"),
        ((event("a"), b'data: {"error": "gone"}\n\n', DONE), "error in stream"),
        ((event("a"),), "truncated"),
        ((event("a"), DONE.rstrip()), "truncated"),
        ((event("a"), b"data: {nonsense\n\n", DONE), "malformed"),
        ((event("a"), b'data: {"choices": 3}\n\n', DONE), "malformed"),
        ((), "truncated"),
    ],
)
def test_failures_under_status_200(pieces: tuple[bytes, ...], kind: str) -> None:
    failure = read(*pieces).failure
    assert failure is not None
    assert failure[0] == kind


def test_a_falsy_error_is_none() -> None:
    assert read(event("a", error=None), DONE).failure is None


@pytest.mark.parametrize(("moment", "tokens"), [(-1.0, 0), (0.0, 1), (1.5, 5), (2.0, 9), (9.0, 9)])
def test_tokens_until_a_moment(moment: float, tokens: int) -> None:
    reader = read(event("a", **usage(1)), event("bcde", **usage(5)), event("fghi", **usage(9)), DONE)
    assert record(reader).tokens_until(moment) == tokens
