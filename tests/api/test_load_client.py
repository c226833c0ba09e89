"""`saccade bench` reads our own streams to the last token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.load.cli import main
from decoding.messages import DrafterStats, SpeculationStats
from tests.api.harness import live, saying

STATS = SpeculationStats(steps=2, drafted=5, accepted=3, by_drafter={"ngram": DrafterStats(5, 3)})


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_tokens_of_each_chunk_and_the_account_of_speculation_are_read(endpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    with live(saying([300, 301], [302, 303, 304], stats=STATS)) as url:
        words = ["--endpoint", endpoint, "--num-prompts", "4", "--concurrency", "2", "--random-input-len", "4"]
        assert main(["--base-url", url, *words, "--random-output-len", "5", "--no-progress", "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    (summary,) = found["summaries"]
    assert (summary["succeeded"], summary["output_tokens"], summary["short"]) == (4, 20, 0)
    assert summary["source"] == "usage of each chunk"
    assert summary["speculation"] == {
        "drafted": 20,
        "accepted": 12,
        "tokens_per_step": 2.5,
        "by_drafter": {"ngram": [20, 12]},
        "counters": False,
    }
    assert found["servers"][0]["model"] == "demo"
    assert all(request["output_tokens"] == 5 for request in found["requests"])


def test_an_error_in_mid_stream_is_counted(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    answers = iter([saying([300])] + [saying([300], [301], reason="error")] * 2)
    with live(lambda request: next(answers)(request)) as url:
        words = ["--base-url", url, "--num-prompts", "2", "--random-input-len", "4", "--no-progress"]
        assert main([*words, "--output", str(out)]) == 1
    assert json.loads(out.read_text())["summaries"][0]["errors"] == {"error in stream": 2}
