"""Prompts of the load-testing client, in every form; and when requests come."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.load.arrivals import arrival_times
from benchmarks.load.prompts import Prompt, Synthetic, approximate_tokens, read_prompts, synthetic_prompts
from benchmarks.load.settings import Load
from decoding.errors import ConfigError

ROOT = Path(__file__).parents[2]


def written(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def read(path: Path, output_len: int | None = None) -> list[Prompt]:
    return read_prompts(path, output_len, 50, approximate_tokens)


def test_lines_with_prompts(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "a\u2028b", "max_tokens": 7}, {"prompt": "c", "other": 1})
    assert read(path) == [Prompt(7, "a\u2028b"), Prompt(50, "c")]
    assert [prompt.max_tokens for prompt in read(path, output_len=9)] == [9, 9]


def test_lines_with_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert read(written(tmp_path / "p.jsonl", {"messages": messages})) == [Prompt(50, messages=tuple(messages))]


def test_spec_bench_questions(tmp_path: Path) -> None:
    path = written(tmp_path / "question.jsonl", {"question_id": 81, "category": "writing", "turns": ["one", "two"]})
    assert read(path) == [Prompt(50, "one", category="writing")]


def test_conversations_of_sharegpt(tmp_path: Path) -> None:
    said = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "why?"}, {"from": "gpt", "value": "b" * 80}]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"id": "1", "conversations": said}, {"id": "2", "conversations": said[:1]}]))
    assert read(path) == [Prompt(20, "why?")]
    assert read(path, output_len=4) == [Prompt(4, "why?")]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "workloads").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_our_workloads_are_read(path: Path) -> None:
    prompts = read(path)
    assert len(prompts) == len(path.read_text(encoding="utf-8").splitlines())
    assert all(prompt.text and prompt.max_tokens for prompt in prompts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt":', "line 2 is no JSON"),
        ('{"text": "a"}', "line 1 has no prompt"),
        ('{"prompt": "a", "max_tokens": 0.5}', "max_tokens is 0.5"),
        ("3", "line 1 is not an object"),
        ('[{"conversations": 3}]', "entry 1: conversations must be"),
        ("", "has no prompts"),
        ('[{"conversations": []}]', "has no prompts"),
    ],
)
def test_files_of_no_use_are_refused_with_the_place(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "p.jsonl")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dataset-path"):
        read(tmp_path / "p.jsonl")


def test_synthetic_prompts_have_their_lengths_and_their_prefix() -> None:
    shape = Synthetic(input_len=40, output_len=10, range_ratio=0.5, prefix_len=5)
    prompts = synthetic_prompts(shape, 64, seed=1)
    words = [prompt.text.split() for prompt in prompts]
    assert {tuple(each[:5]) for each in words} == {tuple(words[0][:5])}
    lengths = {len(each) - 5 for each in words}
    assert 20 <= min(lengths) <= max(lengths) <= 60
    assert len(lengths) > 10
    assert {prompt.max_tokens for prompt in prompts} <= set(range(5, 16))
    assert len({prompt.text for prompt in prompts}) == 64
    assert prompts == synthetic_prompts(shape, 64, seed=1) != synthetic_prompts(shape, 64, seed=2)


def test_a_tokenizer_cuts_synthetic_prompts() -> None:
    cuts = []

    def cut(text: str, tokens: int) -> str:
        cuts.append(tokens)
        return text[:tokens]

    prompts = synthetic_prompts(Synthetic(input_len=8), 3, 0, cut)
    assert [len(prompt.text) for prompt in prompts] == [8, 8, 8]
    assert cuts == [0, 8, 8, 8]


def times(load: Load, number: int, seed: int = 0) -> list[float]:
    return list(itertools.islice(arrival_times(load, np.random.default_rng(seed)), number))


def test_poisson_arrivals_have_their_rate_and_their_spread() -> None:
    gaps = np.diff(times(Load(rate=4.0), 20_000))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)  # of an exponential distribution


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (100.0, 0.1)])
def test_burstiness_spreads_gaps_and_keeps_the_rate(burstiness: float, spread: float) -> None:
    gaps = np.diff(times(Load(rate=4.0, burstiness=burstiness), 20_000))
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)  # 1 / sqrt(shape)


def test_other_arrivals() -> None:
    assert times(Load(rate=2.0, arrival="constant"), 4) == [0.0, 0.5, 1.0, 1.5]
    assert times(Load(rate=2.0, arrival="burst", burst_size=3), 7) == [0.0, 0.0, 0.0, 1.5, 1.5, 1.5, 3.0]
    assert times(Load(rate=float("inf")), 3) == [0.0, 0.0, 0.0]


def test_arrivals_are_the_same_for_the_same_seed() -> None:
    assert times(Load(rate=2.0), 9, seed=5) == times(Load(rate=2.0), 9, seed=5) != times(Load(rate=2.0), 9, seed=6)
