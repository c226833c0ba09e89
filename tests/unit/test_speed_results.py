"""What the speed benchmarks make of what they measured: ratios, checks, tables, documents, the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import documents
from benchmarks.cells import (
    Cell,
    Spread,
    Stage,
    Turn,
    best_fixed,
    from_json,
    geometric_mean,
    never_slower,
    rates,
    ratio,
    to_json,
    tokens_per_step,
)
from benchmarks.checks import Check, check_spread, matrix_checks
from benchmarks.closed_loop import Window
from benchmarks.documents import Document
from benchmarks.gpu_tables import gpu_checks
from benchmarks.measure import Run
from benchmarks.offline_tables import limits_text, offline_checks, over_one, speeds_text
from benchmarks.peer_tables import compare_checks, compare_table
from benchmarks.roofline import Roofline, weights_read
from benchmarks.speed_report import main as report
from benchmarks.speed_tables import checks_table, matrix_tables

ROOT = Path(__file__).parents[2]
ROOF = {"weights": 10**9, "weight_bytes": 2 * 10**9, "kv_bytes": 1000, "read_bandwidth": 1e10, "flops": 1e12}
SESSION = {
    "date": "2026-01-01",
    "command": "python -m benchmarks.it",
    "commit": "abc",
    "dirty": False,
    "python": "3.11",
    "packages": {"torch": "2"},
    "cpu": "Abacus",
    "cores_allowed": 2,
    "threads": 2,
    "load_average": [0.0, 0.1, 0.2],
    "dtypes": {"saccade": "bfloat16"},
    "models": {"target": {"path": "demo/target", "sha256": "f" * 64}},
    "device": "Abacus 9000",
}


def window(rate: float, steps: int = 50) -> Window:
    return Window(100, 100 / rate, steps, 0.5, 0.1, 10, 5)


def turn(system: str, rate: float, round: int = 0, stage: Stage = "paired") -> Turn:
    return Turn(system, stage, round, window(rate))


def cell(*turns: Turn, **changes: Any) -> Cell:
    given = {"family": "demo", "concurrency": 1, "temperature": 0.0, "best": "tree-24", "window": 100}
    return Cell(**{**given, **changes}, turns=tuple(turns))


def rounds(plain: float, best: float, auto: float) -> list[Turn]:
    paces = enumerate((1.0, 0.5, 0.9))  # the machine's, round by round
    return [turn(s, r * pace, n) for n, pace in paces for s, r in (("plain", plain), ("tree-24", best), ("auto", auto))]


def test_the_best_fixed_setting_is_chosen_by_its_median_on_runs_of_its_own() -> None:
    select = [turn("ngram-8", rate, n, "select") for n, rate in enumerate((10.0, 11.0, 99.0))]
    select += [turn("tree-24", rate, n, "select") for n, rate in enumerate((12.0, 12.0, 12.0))]
    others = [turn("plain", 500.0, 0, "select"), turn("auto", 500.0, 0, "select"), turn("ngram-8", 500.0, 3)]
    assert best_fixed([*select, *others]) == "tree-24"
    with pytest.raises(ValueError, match="no fixed setting"):
        best_fixed(others)


def test_a_ratio_is_formed_within_a_round_so_that_the_machines_pace_cancels() -> None:
    found = ratio(cell(*rounds(100, 120, 150)), "auto", ("plain",))
    assert found is not None
    assert (found.median, found.low, found.high, found.rounds) == pytest.approx((1.5, 1.5, 1.5, 3))


def test_never_slower_is_against_the_faster_one_of_each_round() -> None:
    turns = [turn("plain", 100, 0), turn("tree-24", 90, 0), turn("auto", 100, 0)]
    turns += [turn("plain", 90, 1), turn("tree-24", 100, 1), turn("auto", 90, 1), turn("auto", 1, 2)]
    found = never_slower(cell(*turns))
    assert found is not None
    assert (found.median, found.low, found.high, found.rounds) == pytest.approx((0.95, 0.9, 1.0, 2))
    assert never_slower(cell(turn("auto", 1))) is None


def test_rates_are_of_paired_runs_or_of_those_for_selection() -> None:
    one = cell(turn("tree-24", 5, 0, "select"), turn("tree-24", 7, 1), turn("ngram-8", 3, 0, "select"))
    assert rates(one, "tree-24") == pytest.approx([7])
    assert rates(one, "ngram-8") == pytest.approx([3])
    assert rates(one, "draft-chain-4") == []
    assert tokens_per_step(cell(turn("auto", 5), concurrency=4), "auto") == pytest.approx(100 / 50 / 4)


def test_a_cell_survives_json() -> None:
    one = cell(*rounds(1, 2, 3))
    assert from_json(json.loads(json.dumps(to_json(one)))) == one


def test_never_slower_is_judged_over_all_cells_and_gains_at_one_request() -> None:
    good = cell(*rounds(100, 120, 180))
    poor = cell(*rounds(100, 80, 92), concurrency=8, family="large")
    sampled = cell(*rounds(100, 80, 119), temperature=1.0, family="large")
    checks = {check.text: check for check in matrix_checks([good, poor, sampled])}
    mean = checks["auto / max(plain, best fixed), geometric mean of 3 cells"]
    assert mean.measured == pytest.approx((1.5 * 0.92 * 1.19) ** (1 / 3))
    assert mean.measured == geometric_mean([good, poor, sampled])
    assert mean.passed is True
    worst = checks["the same, worst cell (large, T=0, concurrency 8)"]
    assert (worst.measured, worst.passed) == (pytest.approx(0.92), False)
    assert checks["demo, T=0, one request: auto / plain"].passed is True
    assert checks["large, T=1, one request: auto / plain"].passed is False
    assert not any("demo, T=1" in text for text in checks)  # nothing is asked of the demo there
    assert matrix_checks([]) == []


def test_a_bound_is_from_below_or_from_above_and_what_did_not_run_is_neither() -> None:
    assert Check("", 1.0, 1.0).passed is True
    assert Check("", 1.0, 0.99).passed is False
    assert Check("", 1.0, 0.99, at_most=True).passed is True
    assert Check("", 1.0, None).passed is None
    spread = check_spread("it", 2.0, Spread.of([1.0, 3.0, 2.5]))
    assert (spread.measured, spread.low, spread.high, spread.passed) == (2.5, 1.0, 3.0, True)
    lines = checks_table([spread, Check("up", 1.0, 2.0, at_most=True), Check("none", 1.0, None)]).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["pass", "MISS", "measured"]


FORWARD = {"part": "forward", "family": "large", "context": 256, "times": {"1": [1.0] * 5, "8": [1.1] * 5}}
LIMITS = {
    "part": "limits",
    "family": "large",
    "context": 128,
    "steps": [0.25, 0.5],
    "linears": [0.2, 0.4],
    "roofline": ROOF,
}


def test_trees_and_linears_have_bounds_from_above() -> None:
    FORWARD_16 = {**FORWARD, "times": {**FORWARD["times"], "16": [2.0] * 5}}
    checks = offline_checks([FORWARD_16, LIMITS, {**LIMITS, "family": "demo"}])
    assert [(round(check.measured or 0, 3), check.passed) for check in checks] == [
        (1.1, True),
        (2.0, False),
        (1.25, False),
    ]
    assert over_one(FORWARD, 16) is None
    assert offline_checks([FORWARD])[1].passed is None


def test_a_single_slow_pass_does_not_move_a_trees_cost() -> None:
    times = {"1": [1.0] * 25, "8": [1.1] * 24 + [50.0]}
    found = over_one({**FORWARD, "times": times}, 8)
    assert found == Spread(pytest.approx(1.1), pytest.approx(1.1), pytest.approx(1.1), 5)


def test_limits_are_told_as_shares_of_the_bandwidth() -> None:
    text = limits_text({**LIMITS, "steps": [0.25], "linears": [0.2]})
    assert "2000 MB of weights" in text
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["80%", "100%", "100%"]


def test_speeds_divide_the_time_of_a_step() -> None:
    turns = [{"system": s, "round": 0, "window": asdict(window(r))} for s, r in (("plain", 100.0), ("auto", 200.0))]
    lines = speeds_text({"temperature": 0.0, "turns": turns}).splitlines()
    # 100 tokens, 50 steps, 0.5 s of which all in the forward pass but 0.1 s that the drafters took
    assert lines[-1].split() == ["auto", "200.0", "2.00", "2.00..2.00", "2.00", "10.00", "10.00", "2.00", "-2.00"]


def test_the_roof_is_memory_for_few_rows_and_arithmetic_for_many() -> None:
    roof = Roofline(**ROOF)
    assert roof.tokens_per_second(1, 0) == pytest.approx(5.0)
    assert roof.tokens_per_second(2, 10**6) == pytest.approx(2 / 0.4)  # as many bytes of K/V as of weights
    assert roof.tokens_per_second(1000, 0) == pytest.approx(1e12 / 2e9)


def test_an_embedding_that_is_the_head_is_read() -> None:
    tied = weights_read(ROOT / "demo/target")
    config = json.loads((ROOT / "demo/target/config.json").read_text())
    assert config["tie_word_embeddings"]
    layer = 256 * 64 * (4 + 2 + 2) + 64 * 4 * 256 + 3 * 256 * 704 + 2 * 256
    assert tied == 8 * layer + 256 + 8192 * 256


def peer_piece(family: str, seconds: dict[str, float]) -> dict[str, Any]:
    runs = [
        asdict(Run(name, number, 0.0, (0,), s * pace, 8, 8, ("x",)))
        for name, s in seconds.items()
        for number, pace in enumerate((1.0, 2.0))
    ]
    return {"family": family, "temperature": 0.0, "concurrency": 1, "settings": {"hf": "threads=2"}, "runs": runs}


def test_peers_are_compared_with_their_fastest() -> None:
    demo = peer_piece("demo", {"plain": 1.0, "auto": 0.5, "hf": 3.0, "hf-lookup": 1.0, "hf-assisted": 2.0})
    large = peer_piece("large", {"plain": 1.0, "auto": 0.5, "llama": 0.95, "llama-draft": 0.7, "llama-ngram": 0.6})
    found = {check.text: (round(check.measured or 0, 2), check.passed) for check in compare_checks([demo, large])}
    assert found == {
        "demo, T=0, plain decoding / transformers' generate": (3.0, True),
        "demo, T=0, auto / transformers' assisted generation": (4.0, True),
        "demo, T=0, auto / transformers' lookup generation": (2.0, False),
        "large, T=0, plain decoding / llama.cpp's": (0.95, True),
        "large, T=0, auto / the best speculation of llama.cpp": (1.2, False),
    }
    table = compare_table(demo).splitlines()
    assert [line.split()[0] for line in table[2:7]] == ["plain", "auto", "hf", "hf-assisted", "hf-lookup"]
    assert table[3].split()[1:4] == ["16.0", "2.00", "2.00..2.00"]  # 8 tokens in 0.5 s
    alone = compare_checks([peer_piece("large", {"plain": 1.0, "auto": 0.5})])
    assert [check.passed for check in alone] == [None, None]


def test_the_device_is_judged_by_what_ran() -> None:
    assert {check.passed for check in gpu_checks([])} == {None}
    forward = {**FORWARD, "times": {"1": [1.0] * 5, "32": [1.1] * 5}}
    pieces = [forward, {**LIMITS, "steps": [0.25] * 3}]
    pieces += [{**to_json(cell(*rounds(100, 200, 290))), "part": "cell"}]
    pieces += [{**peer_piece("8b", {"plain": 1.0, "auto": 0.5, "hf": 2.0}), "part": "peer"}]
    checks = gpu_checks(pieces)
    assert [check.passed for check in checks] == [True, True, False, None, True, True, True]
    assert checks[0].measured == pytest.approx(0.8)


def test_documents_are_written_whole_and_put_together(tmp_path: Path) -> None:
    first, second = tmp_path / "deep" / "a.json", tmp_path / "b.json"
    Document("matrix", [{"n": 1}], [{"session": 0, "x": 1}]).save(first)
    Document("matrix", [{"n": 2}, {"n": 3}], [{"session": 1, "x": 2}]).save(second)
    assert [path.name for path in first.parent.iterdir()] == ["a.json"]
    merged = documents.merge([documents.load(first), documents.load(second), Document("gpu", [{"n": 4}])])
    assert set(merged) == {"matrix", "gpu"}
    whole = merged["matrix"]
    assert [(whole.sessions[piece["session"]]["n"], piece["x"]) for piece in whole.pieces] == [(1, 1), (3, 2)]


def test_a_page_is_written_from_results_and_says_what_is_missing(tmp_path: Path) -> None:
    cells = [cell(*rounds(100, 120, 118), concurrency=c, temperature=t) for c in (1, 2) for t in (0.0, 1.0)]
    made = {
        "matrix": [to_json(one) for one in cells],
        "offline": [{**FORWARD, "session": 0, "family": "demo"}, {**LIMITS, "session": 0, "family": "demo"}],
        "compare": [{**peer_piece("demo", {"plain": 1.0, "auto": 0.5, "hf": 4.0}), "session": 0}],
    }
    for kind, pieces in made.items():
        Document(kind, [SESSION], pieces).save(tmp_path / f"{kind}.json")
    out = tmp_path / "docs" / "benchmarks.md"
    (tmp_path / "bf16-flips.txt").write_text("texts  flips\n\n   20      0\n")
    given = [*(str(tmp_path / f"{kind}.json") for kind in made), str(tmp_path / "bf16-flips.txt")]
    assert report([*given, "--out", str(out)]) == 0
    page = out.read_text()
    pictures = {"speed-demo", "never-slower", "forward-cost", "peers"}
    assert all(f"(images/{name}.png)" in page for name in pictures)
    assert {path.stem for path in (out.parent / "images").iterdir()} == pictures
    assert "Not measured: no CUDA device" in page
    assert matrix_tables(cells).splitlines()[2].strip() in page
    assert "python -m benchmarks.it" in page
    assert "## Bf16 flips\n\n    texts  flips\n\n       20      0\n" in page
    assert report([str(tmp_path / "matrix.json"), "--out", str(out)]) == 0
    assert "Single requests were not measured" in out.read_text()


def test_a_file_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"runs": []}')
    assert report([str(other), "--out", str(tmp_path / "page.md")]) == 1
    assert "holds no result of these benchmarks" in capsys.readouterr().err
    assert report([str(tmp_path / "none.json"), "--out", str(tmp_path / "page.md")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
