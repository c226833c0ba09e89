"""The quick benchmark: its arithmetic, the order of measuring, and one tiny run of the command itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import Case, Run, Task, groups, ratio, same_text, summarise, typical
from benchmarks.provenance import cpu_model, git_state, weights_hash
from benchmarks.quick import SYSTEMS, Options, measure, parse
from benchmarks.report import COLUMNS, shares, summary_row, table
from benchmarks.requirements import judge, requirements
from benchmarks.systems import checked_tokens, digest

ROOT = Path(__file__).parents[2]


def run(system: str = "plain", seconds: float = 1.0, *, prompts: tuple[int, ...] = (0,), round: int = 0, **more) -> Run:
    given = {"temperature": 0.0, "tokens": 8 * len(prompts), "steps": 8, "texts": ("same",) * len(prompts), **more}
    return Run(system=system, round=round, prompts=prompts, seconds=seconds, **given)


def test_a_typical_run_is_the_median_of_each_prompt() -> None:
    runs = [run(seconds=seconds, round=number) for number, seconds in enumerate((9.0, 1.0, 2.0))]
    runs += [run(seconds=seconds, round=number, prompts=(1,)) for number, seconds in enumerate((4.0, 3.0))]
    assert [typed.seconds for typed in typical(runs)] == [2.0, 3.0]


def test_total_is_time_and_the_geometric_mean_is_over_prompts() -> None:
    plain = [run(seconds=4.0), run(seconds=4.0, prompts=(1,))]
    fast = [run("both", 1.0), run("both", 4.0, prompts=(1,))]
    found = ratio(fast, plain)
    assert found is not None
    assert found.total == pytest.approx(8 / 5)
    assert found.geomean == pytest.approx(2.0)
    assert found.worst_prompt == pytest.approx(1.0)
    assert (found.low, found.high) == (found.total, found.total)


def test_a_slow_round_cancels_and_a_stall_shows_in_the_spread() -> None:
    plain = [run(seconds=2.0 * pace, round=number) for number, pace in enumerate((1, 5, 1))]
    fast = [run("both", pace, round=number) for number, pace in enumerate((1.0, 5.0, 4.0))]
    found = ratio(fast, plain)
    assert found is not None
    assert found.total == found.geomean == pytest.approx(2.0)
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(2.0))


def test_only_rounds_of_both_systems_count() -> None:
    plain = [run(seconds=2.0), run(seconds=100.0, round=1)]
    found = ratio([run("hf", 4.0)], plain)
    assert found is not None
    assert found.total == pytest.approx(0.5)
    assert ratio([run("hf", 4.0)], [run(round=1)]) is None
    assert ratio([], plain) is None


def test_requests_at_once_are_compared_with_the_same_prompts_one_by_one() -> None:
    plain = [run(seconds=1.0), run(seconds=2.0, prompts=(1,))]
    found = ratio([run("plain-x8", 2.0, prompts=(0, 1, 0, 0))], plain)
    assert found is not None
    assert found.total == found.geomean == pytest.approx(5 / 2)


def test_the_last_group_is_filled_from_the_beginning() -> None:
    cases = [Case(index, (1,), index) for index in range(5)]
    assert [[[case.index for case in part] for part in pair] for pair in groups(cases, 3)] == [
        [[0, 1, 2], [0, 1, 2]],
        [[3, 4], [3, 4, 0]],
    ]
    assert [case.index for case in groups(cases[:1], 3)[0][1]] == [0, 0, 0]


def test_a_summary_divides_the_time_of_a_step() -> None:
    plain = [run(seconds=4.0, tokens=8, steps=8, forward_seconds=3.0, draft_seconds=0.0, drafted=0, accepted=0)]
    counts = {"ngram": {"drafted": 9, "accepted": 3}, "draft": {"drafted": 9, "accepted": 5}}
    both = run("both", 2.0, steps=2, forward_seconds=1.0, draft_seconds=0.4, drafted=12, accepted=6, by_drafter=counts)
    found = summarise([both], plain, comparable_text=True)
    assert found.tokens_per_second == pytest.approx(4.0)
    assert found.tokens_per_step == pytest.approx(4.0)
    assert found.speedup is not None
    assert found.speedup.total == pytest.approx(2.0)
    assert found.denominator == pytest.approx(2.0)  # a step of 1 s against one of 0.5 s
    assert (found.forward_ms, found.draft_ms, found.rest_ms) == pytest.approx((500.0, 200.0, 300.0))
    assert found.step_ms == pytest.approx(1000.0)
    assert (found.drafted, found.accepted, found.same_text) == (12, 6, (1, 1))
    assert shares(found) == "both, accepted by drafter: ngram 3 of 9, draft 5 of 9"
    assert summary_row(found)[1:6] == ["4.0", "2.00", "2.00..2.00", "4.00", "2.00"]


def test_what_a_system_does_not_say_is_a_dash() -> None:
    row = dict(zip(COLUMNS, summary_row(summarise([run("hf")], [], comparable_text=False)), strict=True))
    assert {name for name, cell in row.items() if cell == "-"} == set(COLUMNS) - {
        "system",
        "tokens/s",
        "tokens/step",
        "step ms",
    }


def test_a_text_that_differs_once_is_not_the_same() -> None:
    plain = [run(texts=("a",)), run(prompts=(1,), texts=("b",))]
    runs = [run("both", texts=("a",)), run("both", round=1, texts=("x",)), run("both", prompts=(1,), texts=("b",))]
    assert same_text(runs, plain) == (1, 2)
    assert same_text([run("x8", prompts=(0, 1, 0), texts=("a", "b", "x"))], plain) == (1, 2)
    assert digest([1, 2]) != digest([2, 1])


def test_requirements_are_held_against_the_total_time() -> None:
    runs = {
        (0.0, "plain"): [run(seconds=1.3)],
        (0.0, "both"): [run("both", 1.01)],
        (0.0, "hf"): [run("hf", 4.0)],
        (0.8, "plain"): [run(seconds=1.0, temperature=0.8)],
        (0.8, "both"): [run("both", 1.0, temperature=0.8)],
    }
    verdicts = {
        (found.temperature, found.requirement.system, found.requirement.reference): found for found in judge(runs)
    }
    assert {key: found.passed for key, found in verdicts.items() if found.passed is not None} == {
        (0.0, "plain", "hf"): True,
        (0.0, "both", "plain"): False,  # 1.29 where 1.3 is asked for
        (0.8, "both", "plain"): True,
    }
    assert len(verdicts) == len(requirements(0.0)) + len(requirements(0.8))


def test_a_table_has_straight_columns() -> None:
    assert table([("a", "bb"), ("ccc", "1")]) == "a    bb\nccc   1"


class FakeSystem:
    """Notes what it is asked to do."""

    def __init__(self, name: str, log: list[tuple[str, Task]], *, batch: int = 1, peer: bool = False) -> None:
        self.name, self.batch, self.peer, self._log = name, batch, peer, log

    def run(self, task: Task) -> Run:
        self._log.append((self.name, task))
        prompts = tuple(case.index for case in task.cases)
        return run(self.name, prompts=prompts, round=task.round, temperature=task.temperature)


def options(**changes) -> Options:
    return dataclasses.replace(parse([]), **changes)


def test_systems_take_turns_prompt_by_prompt() -> None:
    log: list[tuple[str, Task]] = []
    systems = [FakeSystem("plain", log), FakeSystem("plain-x8", log, batch=8), FakeSystem("hf", log, peer=True)]
    cases = [Case(index, (1,), index) for index in range(10)]
    runs = list(measure(systems, cases, options(rounds=3, peer_rounds=2)))
    assert len(runs) == len(log) == 2 * (3 * 10 + 3 * 2 + 2 * 10)
    assert {number for name, number in ((r.system, r.round) for r in runs) if name == "hf"} == {0, 1}
    assert all(len(r.prompts) == (8 if r.system == "plain-x8" else 1) for r in runs)
    single = [(r.system, r.prompts) for r in runs if r.round == 0 and r.temperature == 0 and len(r.prompts) == 1]
    assert all({single[i][0], single[i + 1][0]} == {"plain", "hf"} for i in range(0, 20, 2))
    assert all(single[i][1] == single[i + 1][1] for i in range(0, 20, 2))
    assert len({single[i][0] for i in range(0, 20, 2)}) == 2, "the order never changes"
    for name in ("plain", "hf"):
        tasks = [(t.temperature, t.cases[0].index) for n, t in log if n == name and t.round == 0]
        assert sorted(tasks) == [(t, index) for t in (0.0, 0.8) for index in range(10)]


def test_a_text_of_another_length_is_an_error() -> None:
    task = Task(0, 0.0, (Case(0, (1,), 1),), 3)
    assert checked_tokens("it", task, [[1, 2, 3]]) == 3
    with pytest.raises(RuntimeError, match=r"it made \[2\] tokens where 3 were asked for"):
        checked_tokens("it", task, [[1, 2]])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "plian"], "did you mean 'plain'"), (["--prompt", "3"], "--prompts"), (["--rounds", "0"], "--rounds")],
)
def test_a_wrong_command_line_names_the_right_one(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert message in capsys.readouterr().err


def test_provenance_of_files_and_machine(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    assert weights_hash(tmp_path) is None
    hashes = []
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        hashes.append(weights_hash(tmp_path))
    assert None not in hashes
    assert len(set(hashes)) == 2
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Abacus 3000\n")
    assert cpu_model(info) == "Abacus 3000"


@pytest.mark.process
def test_the_command_measures_every_system(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "quick.json"
    words = ["--prompts", "1", "--tokens", "8", "--rounds", "1", "--peer-rounds", "1", "--threads", "1", "--out"]
    command = [sys.executable, "-m", "benchmarks.quick", *words, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert {(r["system"], r["temperature"]) for r in document["runs"]} == {(s, t) for s in SYSTEMS for t in (0.0, 0.8)}
    assert all(r["tokens"] == 8 * len(r["prompts"]) and r["seconds"] > 0 for r in document["runs"])
    plain = next(s for s in document["summaries"] if s["system"] == "plain")
    assert (plain["tokens_per_step"], plain["denominator"], plain["drafted"]) == (1.0, 1.0, 0)
    assert len(document["requirements"]) == 10
    assert all(
        r["passed"] is (r["measured"]["total"] >= r["requirement"]["at_least"]) for r in document["requirements"]
    )
    source = document["provenance"]
    assert source["threads"] == 1
    assert source["thread_variables"]["OMP_NUM_THREADS"] == "1"  # set before torch was imported
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(source["thread_variables"])
    assert "--prompts 1" in source["command"]
    assert all(len(model["sha256"]) == 64 for model in source["models"].values())
    assert all(name in done.stdout for name in SYSTEMS)


def test_asking_git_does_not_write_the_index(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("x")
    git("add", "file")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-m", "t")
    os.utime(tmp_path / "file", (1, 1))  # a plain status would note this in the index
    before = (tmp_path / ".git" / "index").read_bytes()
    assert git_state(tmp_path)["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == before
