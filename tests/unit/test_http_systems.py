"""Streams of our own server, read after they were timed."""

from __future__ import annotations

import hashlib
import json

import pytest

from benchmarks.http_systems import completion_body, read_stream
from benchmarks.measure import Case, Task


def stream(*chunks: dict[str, object], done: bool = True) -> bytes:
    events = [f"data: {json.dumps(chunk)}" for chunk in chunks]
    return "\n\n".join([*events, *(["data: [DONE]"] if done else []), ""]).encode()


USAGE = {"completion_tokens": 3, "speculation": {"by_drafter": {"ngram": {"drafted": 4, "accepted": 1}}}}


def test_a_stream_is_text_tokens_and_what_was_drafted() -> None:
    answer = read_stream(
        stream({"choices": [{"text": "de"}]}, {"choices": [{"text": "f"}]}, {"choices": [], "usage": USAGE})
    )
    assert answer.text == hashlib.sha256(b"def").hexdigest()[:16]
    assert answer.tokens == 3
    assert answer.by_drafter == {"ngram": {"drafted": 4, "accepted": 1}}


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="truncated"):
        read_stream(stream({"choices": [{"text": "de"}]}, done=False))


def test_an_error_in_a_stream_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the engine is gone"):
        read_stream(stream({"error": {"message": "the engine is gone"}}))


def test_a_request_is_a_stream_that_tells_its_usage() -> None:
    body = completion_body((1, 2), 9, Task(0, 0.5, (Case(0, (1, 2), 9),), 16))
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["seed"]) == ([1, 2], 16, 0.5, 9)
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
