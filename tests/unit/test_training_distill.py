"""Self-distillation: the target's own text, whatever interrupts its writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decoding.engine import Engine
from decoding.request import SamplingParams
from decoding.text import Tokenizer
from training.data import Corpus, read_documents
from training.errors import TrainError
from training.self_distill import distill

DEMO = Path(__file__).parents[2] / "demo"
TARGET = DEMO / "target"
PROMPTS = ["def add(a, b):\n", "import os\n", "class Stack:\n", "for i in range(10):\n    ", "x = [1, 2"]
SETTINGS: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "batch": 2, "device": "cpu"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_continued_as_the_engine_would(prompts: Path, tmp_path: Path) -> None:
    out = distill(TARGET, prompts, tmp_path / "out" / "text.jsonl", **SETTINGS)
    written = lines(out)
    engine = Engine.load(str(TARGET), device="cpu")
    for index, prompt in enumerate(PROMPTS):
        ids = engine.tokenizer.encode(prompt)
        params = SamplingParams(max_tokens=6, seed=3 * 2**32 + index)
        (generation,) = engine.generate(prompt, params)
        entry, ended = written[index], generation.finish_reason == "stop"
        assert entry["index"] == index
        assert entry["prompt_tokens"] == len(ids)
        assert entry["ended"] is ended
        assert entry["token_ids"] == ids + generation.token_ids[: -1 if ended else None]


def test_an_interrupted_file_is_completed_and_comes_out_the_same(prompts: Path, tmp_path: Path) -> None:
    whole = distill(TARGET, prompts, tmp_path / "whole.jsonl", **SETTINGS).read_bytes()
    out = tmp_path / "text.jsonl"
    distill(TARGET, prompts, out, **SETTINGS)
    done = out.read_bytes().splitlines(keepends=True)
    out.unlink()
    part = out.with_name("text.jsonl.part")
    part.write_bytes(done[3] + done[0] + done[1][:20])  # in the order of their ends, the last one cut short
    distill(TARGET, prompts, out, speculate=("ngram",), **SETTINGS)
    assert out.read_bytes() == whole
    assert not part.exists()


def test_a_complete_file_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    out = distill(TARGET, prompts, tmp_path / "text.jsonl", **SETTINGS)
    before = out.stat().st_mtime_ns
    assert distill(TARGET, prompts, out, **SETTINGS) == out
    assert out.stat().st_mtime_ns == before


def test_other_settings_do_not_mix(prompts: Path, tmp_path: Path) -> None:
    out = distill(TARGET, prompts, tmp_path / "text.jsonl", **SETTINGS)
    with pytest.raises(TrainError, match="other prompts or settings"):
        distill(TARGET, prompts, out, **{**SETTINGS, "temperature": 0.5})
    prompts.write_text('{"prompt": "another"}\n')
    with pytest.raises(TrainError, match="other prompts or settings"):
        distill(TARGET, prompts, out, **SETTINGS)


def test_text_is_cut_into_prompts(tmp_path: Path) -> None:
    source = tmp_path / "text.py"
    source.write_text("\n".join(f"value_{n} = {n} * {n + 1}" for n in range(40)))
    ids = Tokenizer.load(TARGET).encode(source.read_text(), add_special_tokens=False)
    written = lines(distill(TARGET, source, tmp_path / "text.jsonl", **{**SETTINGS, "max_tokens": 150}))
    assert len(written) == -(-len(ids) // 150)
    for index, entry in enumerate(written):
        assert entry["token_ids"][: entry["prompt_tokens"]] == ids[150 * index :][:64]


def test_long_prompts_keep_their_ends(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"token_ids": [7 + n % 50 for n in range(1100)]}) + "\n")
    (entry,) = lines(distill(TARGET, prompts, tmp_path / "text.jsonl", **SETTINGS))
    assert entry["prompt_tokens"] == 1024 - 6
    assert entry["token_ids"][:1018] == [7 + n % 50 for n in range(1100)][-1018:]


def test_labels_are_what_the_target_wrote(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    entries = [
        {"token_ids": [11, 12, 13], "prompt_tokens": 1, "ended": True},
        {"token_ids": [14, 15, 16], "prompt_tokens": 2, "ended": False},  # cut off: its end is none
    ]
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    corpus = Corpus.build(read_documents([data]), Tokenizer.load(TARGET), 0, 8192)
    assert corpus.tokens.tolist() == [11, 12, 13, 0, 14, 15, 16, 0]
    assert corpus.counts.tolist() == [False, True, True, True, False, False, True, False]


def test_prompts_that_cannot_be_used_say_so(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="check --self-distill"):
        distill(TARGET, tmp_path / "none.jsonl", tmp_path / "a.jsonl", **SETTINGS)
    with pytest.raises(TrainError, match="lower --distill-tokens"):
        distill(TARGET, prompts, tmp_path / "b.jsonl", **{**SETTINGS, "max_tokens": 1024})
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(TrainError, match="holds no prompts"):
        distill(TARGET, empty, tmp_path / "c.jsonl", **SETTINGS)


def test_a_damaged_part_is_named(prompts: Path, tmp_path: Path) -> None:
    part = tmp_path / "text.jsonl.part"
    part.write_text("no JSON\n")
    with pytest.raises(TrainError, match=r"text\.jsonl\.part is damaged"):
        distill(TARGET, prompts, tmp_path / "text.jsonl", **SETTINGS)
