"""The acceptance report: its arithmetic, its files, and the command itself."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.acceptance import Options, Report, check_limits, parse_sets, settings_of, variants, write
from benchmarks.acceptance_runs import Measured, Variant, accepted_in, speculation, summarise_ranks
from benchmarks.acceptance_tables import comparison, depths, overview, same_texts
from benchmarks.provenance import provenance
from benchmarks.rates import Counts, Estimate, by_depth, conditional, gain, ratio, tokens_per_step
from benchmarks.replay import LISTED
from benchmarks.report_cli import main, parse
from benchmarks.texts import START, Room, load_prompts, load_scripts
from decoding.errors import ConfigError
from decoding.messages import TokenEvent
from tests.engines import ROOT, VOCAB
from tests.unit.test_training import limited_files
from training.errors import TrainError

DEPTH = 4
ROOM = Room(context=64, least=DEPTH + 2)


# rates ---------------------------------------------------------------------------------------------------------------


def test_counts_of_steps() -> None:
    counts = Counts.of([0, 2, 1, 2], depth=3)
    assert counts == Counts(4, (3, 2, 0))
    assert counts.tokens == 4 + 5


def test_rates_weigh_texts_by_their_steps() -> None:
    counts = [Counts.of([0], 2), Counts.of([2, 2, 1], 2)]
    found = tokens_per_step(counts)
    assert found is not None
    assert found.value == pytest.approx(9 / 4)
    assert [e.value for e in by_depth(counts)] == pytest.approx([3 / 4, 2 / 4])
    assert [e.value for e in conditional(counts)] == pytest.approx([3 / 4, 2 / 3])


def test_the_error_of_a_ratio_is_that_of_the_texts() -> None:
    found = ratio([1.0, 3.0, 2.0], [1.0, 1.0, 1.0])  # equal weights: the standard error of a mean
    assert found == Estimate(2.0, pytest.approx(1.0 / math.sqrt(3)))
    assert ratio([6.0], [3.0]) == Estimate(2.0, None)
    assert ratio([0.0], [0.0]) is None
    assert str(ratio([6.0], [3.0])) == "2.00"


def test_the_error_of_a_ratio_is_what_resampling_gives() -> None:
    random = np.random.default_rng(0)
    steps = random.integers(5, 60, 400)
    tokens = steps * random.uniform(1, 4, 400)
    found = ratio(tokens.tolist(), steps.tolist())
    assert found is not None
    picks = random.integers(0, 400, (2000, 400))
    spread = (tokens[picks].sum(1) / steps[picks].sum(1)).std()
    assert found.error == pytest.approx(spread, rel=0.1)


def test_a_gain_is_paired_by_text() -> None:
    slow = [Counts.of([0, 0], 1), Counts.of([1, 0, 1], 1)]
    assert gain(slow, slow) == Estimate(1.0, pytest.approx(0.0))
    fast = [Counts.of([1, 1], 1), Counts.of([1, 1, 1], 1)]
    found = gain(fast, slow)
    assert found is not None
    assert found.value == pytest.approx(2 / (7 / 5))
    assert found.error is not None
    assert found.error > 0
    assert gain(fast, slow[:1]) is None


# texts ---------------------------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    return [ord(letter) % VOCAB for letter in text]


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_prompts_are_cut_to_the_context(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", json.dumps({"prompt": "x" * 50, "id": "a"}), "", json.dumps({"prompt": "y"}))
    prompts = load_prompts(file, encode, ROOM, max_tokens=20, limit=None)
    assert [(p.name, len(p.ids), p.tokens, p.seed) for p in prompts] == [("a", 50, 14, 1), ("line 3", 1, 20, 2)]
    assert len(load_prompts(file, encode, ROOM, max_tokens=20, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "line 2 is not JSON"),
        ('"x"', 'line 2 has no text in "prompt"'),
        ('{"text": "x"}', 'line 2 has no text in "prompt"'),
        ('{"prompt": 3}', 'line 2 has no text in "prompt"'),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        (json.dumps({"prompt": "x" * 60}), "line 2: the prompt has 60 tokens, and the context of 64 leaves no room"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = written(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(ConfigError, match=message):
        load_prompts(file, encode, ROOM, max_tokens=8, limit=None)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*cannot be read"):
        load_prompts(tmp_path / "nowhere", encode, ROOM, max_tokens=8, limit=None)
    with pytest.raises(ConfigError, match="empty"):
        load_prompts(written(tmp_path / "empty"), encode, ROOM, max_tokens=8, limit=None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_scripts(tmp_path / "binary", encode, ROOM, limit=None)
    with pytest.raises(ConfigError, match=f"no text has the {START + ROOM.least} tokens"):
        load_scripts(written(tmp_path / "short.txt", "short"), encode, ROOM, limit=None)


def test_real_texts_are_cut_into_pieces_of_the_context(tmp_path: Path) -> None:
    plain = written(tmp_path / "code.py", "x" * 149)  # and a line end
    assert [(s.name, len(s.ids), s.given) for s in load_scripts(plain, encode, ROOM, limit=None)] == [
        ("code.py+0", 64, START),
        ("code.py+64", 64, START),
        ("code.py+128", 22, START),
    ]
    lines = [json.dumps({"text": "x" * 30}), json.dumps({"prompt": "y" * 5}), json.dumps({"prompt": "y" * 40})]
    scripts = load_scripts(written(tmp_path / "t.jsonl", *lines), encode, ROOM, limit=None)
    assert [len(s.ids) for s in scripts] == [30, 40]


# what counts ---------------------------------------------------------------------------------------------------------


def test_neither_the_prompts_step_nor_the_texts_end_counts() -> None:
    events = [TokenEvent("r", 0, (7,) * count) for count in (1, 3, 1, 5, 2, 1)]
    # made before each step: 0, 1, 4, 5, 10, 12 of 13; a step that may accept 4 needs room for 5
    assert accepted_in(events, tokens=13, depth=4) == [2, 0, 4]


def test_bounds_of_ranks() -> None:
    ranks = [(0, 0), (0, 0), (0, 1), (2, 0), (LISTED, 0)]
    found = summarise_ranks(ranks, "draft", "replay", max_nodes=2)
    assert found.top[1] == pytest.approx([3 / 5, 4 / 5])
    assert found.top[2] == pytest.approx([3 / 5, 1.0])
    assert found.top[4] == found.top[8] == pytest.approx([4 / 5, 1.0])
    assert found.tree == pytest.approx(1 + (3 + 2) / 5)  # the paths (0) and (0, 0)
    assert found.full == pytest.approx(1 + (2 + 2 + 2 + 2 + 0) / 5)
    assert summarise_ranks(ranks, "draft", "replay", max_nodes=63).tree == found.full


def test_what_is_measured_at_a_temperature() -> None:
    assert [v.label for v in variants((0.0, 0.8))] == [
        "T=0",
        "T=0 pruned",
        "T=0.8",
        "T=0.8 uncoupled",
        "T=0.8 typical",
        "T=0.8 pruned",
    ]
    wish = speculation(["a"], Variant(1.0, coupled=False, rule="typical"))
    assert (wish.drafters, wish.coupling) == (("a",), False)
    assert wish.acceptance is not None
    assert wish.acceptance.rule == "typical"


def measured(name: str, variant: Variant, accepted: list[list[int]], text: str = "", tokens: tuple = ()) -> Measured:
    counts = tuple(Counts.of(each, 2) for each in accepted)
    return Measured(name, text or variant.label, variant, counts, nodes=3.0, tokens=tokens)


def test_tables() -> None:
    one = Variant(1.0)
    results = [
        measured("a", one, [[1, 1], [1, 1]], tokens=((1, 2), (3, 4))),
        measured("a", dataclasses.replace(one, coupled=False), [[0, 0], [1, 1]], tokens=((1, 2), (3, 9))),
        measured("a", Variant(0.0), [[0, 2], [2, 0]], text="replay"),
    ]
    assert overview(results) == [["drafters", "T=1", "replay"], ["a", "2.00 ±0.00", "2.00 ±0.00"]]
    (row,) = comparison(results)[1:]
    assert row == ["a", "T=1", "2.00 ±0.00", "1.50 ±0.50", "1.33 ±0.44", "-", "-", "3.0", "-"]
    assert depths(results, 2)[1:] == [
        ["a", "T=1", "", "1.00", "-"],
        ["a", "T=1", "given", "1.00", "-"],
        ["a", "T=1 uncoupled", "", "0.50", "-"],
        ["a", "T=1 uncoupled", "given", "0.50", "-"],
        ["a", "replay", "", "0.50", "0.50"],
        ["a", "replay", "given", "0.50", "1.00"],
    ]
    assert same_texts(results) == (1, 2)


def test_a_full_disk_leaves_the_previous_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "acceptance.json").write_text("old")
    source = {**provenance(["saccade"], {}, {"saccade": "float32"}), "settings": settings_of(options(), [], [])}
    done = Report(source, [measured("a", Variant(0.0), [[1, 1], [1, 0]])], [])
    with limited_files(500), pytest.raises(TrainError, match="unharmed"):
        write(tmp_path / "out", done)
    assert "Tokens per step" in capsys.readouterr().out  # hours of measuring are not lost
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["old"]


# the command ---------------------------------------------------------------------------------------------------------


def options(**given: object) -> Options:
    return Options("m", Path("p"), Path("o"), **given)  # type: ignore[arg-type]


def test_sets_of_drafters() -> None:
    both = ("draft=x", "ngram")
    assert parse_sets(options(speculate=both)) == [("draft",), ("ngram",), ("draft", "ngram")]
    assert parse_sets(options(speculate=("ngram",))) == [("ngram",)]
    assert parse_sets(options(speculate=both, sets="ngram+draft; draft")) == [("ngram", "draft"), ("draft",)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to measure"),
        ({"speculate": ("ngrm",)}, "did you mean 'ngram'"),
        ({"speculate": ("ngram",), "sets": "ngram;draft"}, "'draft', which is no --speculate"),
        ({"speculate": ("ngram",), "sets": "ngram;ngram"}, "different sets"),
        ({"speculate": ("ngram",), "sets": "ngram+ngram"}, "different sets"),
        ({"speculate": ("ngram",), "sets": ";"}, "different sets"),
    ],
)
def test_sets_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sets(options(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"nodes": 64}, "--nodes"), ({"max_depth": 64}, "--max-depth"), ({"max_tokens": 9}, "at least 10")],
)
def test_limits(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_limits(options(**given))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("acceptance m --out o", "--prompts"),
        ("acceptance m --prompts p", "--out"),
        ("speed m --prompts p --out o", "acceptance"),
        ("acceptance m --prompts p --out o --temperatures 0;1", "write it as 0,0.8,1"),
        ("acceptance m --prompts p --out o --temperatures 1,1", "different temperatures"),
        ("acceptance m --prompts p --out o --temperature 1", "did you mean '--temperatures'"),
    ],
)
def test_wrong_command_lines(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(line.split())
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from benchmarks import figures; figures.require()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ConfigError: plots need matplotlib" in done.stderr
    assert "pip install 'saccade[bench]'" in done.stderr


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["acceptance", str(ROOT / "demo/target"), "--speculate", "ngram", "--prompts"]
    words += [str(ROOT / "demo/prompts.jsonl"), "--out", str(tmp_path / "file" / "under")]
    with pytest.raises(ConfigError, match=r"--out .* cannot be made"):
        main(words)


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (ROOT / "demo/prompts.jsonl").read_text().splitlines()]
    prompts = written(tmp_path / "p.jsonl", *(json.dumps({"prompt": line["prompt"][:160]}) for line in lines))
    words = ["acceptance", str(ROOT / "demo/target"), "--speculate", f"draft={ROOT}/demo/draft", "--speculate", "ngram"]
    words += ["--prompts", str(prompts), "--limit", "2", "--max-tokens", "20", "--max-depth", "4"]
    words += ["--temperatures", "0,1", "--sets", "draft;draft+ngram", "--out", str(tmp_path / "deep" / "out")]
    assert main(words) == 0
    out = tmp_path / "deep" / "out"
    document = json.loads((out / "acceptance.json").read_text())
    assert document["provenance"]["command"].startswith("saccade report acceptance")
    assert len(document["provenance"]["models"]["draft"]["sha256"]) == 64
    found = {(m["drafters"], m["text"]): m for m in document["measured"]}
    texts = {v.label for v in variants((0.0, 1.0))} | {"replay"}
    assert set(found) == {(name, text) for name in ("draft", "draft+ngram") for text in texts}
    for (name, text), m in found.items():
        assert 1.0 <= m["tokens_per_step"]["value"] <= 5.0, (name, text)
        assert 0 < m["nodes_per_step"] <= 32
        assert len(m["counts"]) == 2
        assert (m["over_uncoupled"] is not None) == (text in ("T=1", "T=1 pruned"))
    for t in (0, 1):  # the exact rule's text, whatever drafted
        exact = [m["texts"] for m in found.values() if m["text"] in (f"T={t}", f"T={t} uncoupled", f"T={t} pruned")]
        assert all(each == exact[0] for each in exact)
    ranked = [oracle for oracle in document["oracle"] if oracle["drafter"] == "draft"]
    assert [oracle["text"] for oracle in ranked] == ["T=0", "T=1", "T=1 uncoupled", "replay"]
    assert all(each["top"]["1"][0] <= each["top"]["8"][0] and 1 < each["tree"] <= each["full"] for each in ranked)
    printed, page = capsys.readouterr().out, (out / "acceptance.md").read_text()
    assert "draft+ngram" in printed
    assert "| draft+ngram |" in page
    for name in ("acceptance-by-depth.png", "tokens-per-step.png", "oracle.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
