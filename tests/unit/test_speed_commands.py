"""The commands of the speed benchmarks: their words, what they load, and one tiny run of each."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, gpu, matrix, offline
from benchmarks.cells import from_json
from benchmarks.family import Family, load_prompts
from benchmarks.forward_cost import DEPTH, ForcedTrees, random_tree
from benchmarks.offline_tables import offline_text
from benchmarks.settings import FIXED, LEAST_PAGES, SETTINGS, config_of
from decoding.config import EngineConfig
from decoding.drafters import DrafterChoice
from decoding.errors import ConfigError
from decoding.plan_choice import FixedPlan, parse_plan
from models.tree import depths
from tests.engines import tiny_decoder

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
QUICK = ["--prompts", "2", "--prompt-tokens", "8", "--threads", "1", "--drafters", "ngram"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_family_is_a_target_with_what_lies_beside_it(tmp_path: Path) -> None:
    found = Family.find(DEMO)
    assert (found.name, found.target) == ("demo", DEMO / "target")
    assert set(found.drafters) == {"draft", "medusa", "mtp", "eagle3", "early-exit"}
    assert found.speculate(["draft:depth=2", "ngram"]) == (f"draft={DEMO / 'draft'}:depth=2", "ngram")
    alone = Family.find(DEMO / "target")
    assert (alone.target, alone.drafters) == (DEMO / "target", {})
    with pytest.raises(ConfigError, match="has no drafter 'draft'"):
        alone.speculate(["draft"])
    with pytest.raises(ConfigError, match="is no family of models"):
        Family.find(tmp_path)


def test_prompts_are_cut_at_their_beginning() -> None:
    whole, cut = load_prompts(DEMO / "target", 3, 10**6), load_prompts(DEMO / "target", 3, 20)
    assert [case.ids[-20:] for case in whole] == [case.ids for case in cut]
    with pytest.raises(ConfigError, match="lower --prompts"):
        load_prompts(DEMO / "target", 10**6, 20)


def test_every_setting_is_one_that_an_engine_takes() -> None:
    family, base = Family.find(DEMO), EngineConfig("it", num_pages=999)
    configs = {name: config_of(name, family, base) for name in SETTINGS}
    assert configs["plain"].speculate == ()
    assert {DrafterChoice.parse(word).name for word in configs["auto"].speculate} == {*family.drafters, "ngram"}
    assert config_of("auto", family, base, ("ngram",)).speculate == ("ngram",)
    for name, tree in FIXED.items():
        names = tuple(DrafterChoice.parse(word).name for word in configs[name].speculate)
        assert names == tree.names
        assert parse_plan(configs[name].plan) == FixedPlan(tree.nodes, tree.depth, tree.min_probability)
    assert parse_plan(configs["auto"].plan) is None
    assert {config.num_pages for config in configs.values()} == {999}
    assert config_of("auto", family, EngineConfig("it", num_pages=9)).num_pages == LEAST_PAGES


def test_random_trees_are_trees_of_their_size() -> None:
    for size in (1, 8, 64):
        tree = random_tree(3, size, 100, random.Random(size))
        tree.validate()
        assert tree.width == size
        assert int(tree.tokens[0, 0]) == 3
        assert int(depths(tree.parents).max()) <= DEPTH


def test_forced_trees_are_passes_of_their_size_in_an_order_that_changes() -> None:
    target = tiny_decoder(torch.float32)
    trees = ForcedTrees(target, sizes=(1, 4, 16), context=20)
    for size, batch in trees.batches.items():
        batch.validate()
        assert (batch.num_tokens, batch.max_keys) == (size, 19 + size)
    ticks = iter(range(1000))
    times = trees.seconds(3, clock=lambda: float(next(ticks)))
    assert times == {size: [1.0] * 3 for size in (1, 4, 16)}


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (matrix, ["--systems", "plian"], "did you mean 'plain'"),
        (matrix, ["--systems", "plain"], "nothing to compare with"),
        (matrix, ["--resume"], "name it with --out"),
        (matrix, ["--concurency", "3"], "--concurrency"),
        (offline, ["--parts", "speed"], "invalid choice: 'speed'"),
        (compare, ["--peers", "lama"], "invalid choice: 'lama'"),
        (gpu, ["--shape", "8B"], "did you mean '8b'"),
        (gpu, ["--family", "demo"], "--family"),
    ],
)
def test_a_wrong_command_line_names_the_right_one(
    module: object, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.parse(words)  # type: ignore[attr-defined]
    assert message in capsys.readouterr().err


def test_the_matrix_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "matrix.json"
    words = [*QUICK, "--systems", "ngram-8", "--temperatures", "0", "--seconds", "0.01", "--warm-up", "0.01"]
    words += ["--runs", "2", "--tokens", "8", "--out", str(out), "--resume", "--concurrency"]
    matrix.bench(matrix.parse([*words, "1"]), ["first"])
    document = matrix.bench(matrix.parse([*words, "1", "2"]), ["second"])
    again = matrix.bench(matrix.parse([*words, "2", "1"]), ["third"])
    assert len(again.sessions) == len(document.sessions) == 2
    cells = [from_json(piece) for piece in json.loads(out.read_text())["pieces"]]
    assert [(cell.concurrency, cell.session, cell.best) for cell in cells] == [(1, 0, "ngram-8"), (2, 1, "ngram-8")]
    for cell in cells:
        turns = {(turn.system, turn.stage, turn.round) for turn in cell.turns}
        assert turns == {("ngram-8", "select", n) for n in (0, 1)} | {
            (name, "paired", n) for name in ("plain", "ngram-8", "auto") for n in (2, 3)
        }
        plain = [turn.window for turn in cell.turns if turn.system == "plain"]
        assert all(found.tokens == found.steps * cell.concurrency for found in plain)
    other = dataclasses.replace(offline.parse([*QUICK, "--parts", "forward"]), out=out, resume=True)
    with pytest.raises(ConfigError, match="another benchmark"):
        offline.bench(other, ["it"])


def test_single_requests_are_measured_with_each_drafter(tmp_path: Path) -> None:
    words = [*QUICK, "--temperatures", "0", "--seconds", "0.01", "--warm-up", "0.01", "--runs", "1", "--tokens", "8"]
    options = offline.parse([*words, "--out", str(tmp_path / "offline.json")])
    document = offline.bench(options, ["it"])
    speeds, forward, limits = document.pieces
    assert {turn["system"] for turn in speeds["turns"]} == {"plain", *FIXED, "auto", "auto:ngram"}
    assert all(turn["window"]["tokens"] >= turn["window"]["steps"] > 0 for turn in speeds["turns"])
    assert set(forward["times"]) == {"1", "2", "4", "8", "12", "16", "24", "32", "48", "64"}
    assert len(limits["steps"]) == len(limits["linears"]) == 3
    assert limits["roofline"]["weight_bytes"] == 2 * limits["roofline"]["weights"]
    text = offline_text(document.pieces)
    assert all(name in text for name in ("auto:ngram", "query tokens", "MB of weights", "forward pass of 8"))
    assert len(offline.bench(dataclasses.replace(options, resume=True), ["again"]).pieces) == 3


def test_the_gpu_command_runs_its_phases_on_a_small_shape(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--shape", "tiny", "--folder", str(tmp_path), "--concurrency", "1", "2", "--runs", "1"]
    words += ["--seconds", "0.01", "--prompts", "3", "--threads", "1", "--without-transformers"]
    options = gpu.parse([*words, "--out", str(tmp_path / "gpu.json")])
    document = gpu.bench(options, ["it"])
    parts = [piece["part"] for piece in document.pieces]
    assert parts == ["family", "forward", "limits", "cell", "cell", "cell", "cell"]
    assert json.loads((tmp_path / "gpu.json").read_text())["pieces"] == json.loads(json.dumps(document.pieces))
    late = gpu.bench(dataclasses.replace(options, budget=0.0), ["it"])
    assert [piece["part"] for piece in late.pieces] == ["family", "forward", "limits", "cell", "cell"]


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_gpu_command_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no CUDA device" in line
