"""What HTTP costs: that both sides are set up alike, what is made of what came, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine_child import Child
from benchmarks.http_cost import LIBRARY, SERVER, Sample, arguments, engine_of, line, parse, sample_of, summary
from benchmarks.measure import Case, Task
from benchmarks.stream_reader import Stream
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from server.cli import parse as parse_server
from server.engine_launch import engine_environment
from server.flags import engine_config

ROOT = Path(__file__).parents[2]
TASK = Task(0, 0.0, (Case(0, (1, 2), 1), Case(1, (1, 2), 2)), tokens=3)


def test_the_server_has_the_settings_of_the_library() -> None:
    config = EngineConfig(
        "demo/target",
        speculate=("draft=demo/draft", "ngram:max_match=3"),
        dtype="bfloat16",
        device="cpu",
        num_pages=99,
        prefix_caching=False,
        generation_config="vllm",
        threads=3,
    )
    assert engine_config(parse_server(["serve", *arguments(config)])) == config


def stream(*texts: str, counted: int = 3, end: str = "data: [DONE]\n\n") -> Stream:
    chunks = [{"choices": [{"index": 0, "text": text}]} for text in texts]
    events = [*chunks, {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": counted}}]
    found = Stream()
    lines = [f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events]
    found.pieces = [b"HTTP/1.1 200 OK\r\n\r\n", *(text.encode() for text in lines), end.encode()]
    return found


def test_what_came_over_the_connections_is_text_in_chunks() -> None:
    found = sample_of([stream('a "', "\n\u2028b"), stream("c\\")], 2.0, {"http": 1.0}, TASK)
    assert found.texts == ['a "\n\u2028b', "c\\"]
    assert (found.chunks, found.tokens, found.rate) == (3, 6, 3.0)


@pytest.mark.parametrize("bad", [stream("a", counted=2), stream("a", end=""), Stream()])
def test_a_stream_that_is_not_whole_is_an_error(bad: Stream) -> None:
    with pytest.raises(RuntimeError, match="not what was asked for"):
        sample_of([bad], 1.0, {}, TASK)


def test_ratios_are_of_one_task() -> None:
    def pair(library: float, server: float, text: str) -> dict[str, Sample]:
        served = {"engine": 2.0, "http": 0.5, "client": 0.25}
        return {
            LIBRARY: Sample(library, 1000, {"engine": 1.5}, 0, ["a", "b"]),
            SERVER: Sample(server, 1000, served, 500, ["a", text]),
        }

    found = summary([pair(1.0, 1.25, "b"), pair(10.0, 10.0, "b"), pair(2.0, 4.0, "c")])
    assert found["ratio"] == [0.8, 0.5, 1.0]
    assert found["rates"] == {LIBRARY: 500.0, SERVER: 250.0}
    assert found["cpu"] == {LIBRARY: 1500.0, "engine": 2000.0, "http": 500.0, "client": 250.0}
    assert (found["tokens_per_chunk"], found["same_text"]) == (2.0, [5, 6])
    said = line({"setting": "plain", "temperature": 0.0, "streams": 2, **found})
    assert "0.800 [0.500, 1.000]" in said
    assert said.endswith("2.00, 5 of 6")


def test_a_process_without_an_engine_is_said_to_have_none() -> None:
    with pytest.raises(ConfigError, match="no engine process"):
        engine_of(1)


@pytest.mark.process
def test_an_engine_in_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = EngineConfig("demo/target", num_pages=64, prefix_caching=False, threads=1, dtype="float32")
    child = Child(config, engine_environment(config, {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}))
    try:
        done = child.run(TASK)
        assert [len(text) for text in done.texts] == [3, 3]
        assert done.texts == child.run(TASK).texts
        assert done.seconds > 0
        assert done.steps >= 3
    finally:
        child.close()


def test_a_child_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="the engine's process ended"):
        Child(EngineConfig("nowhere/to/be/found"), engine_environment(EngineConfig(""), {"PYTHONPATH": str(ROOT)}))


def test_both_settings_are_measured_by_default() -> None:
    options = parse([])
    assert (options.settings, options.streams, options.threads) == (("plain", "auto"), 32, 1)
