"""What is made of the drafters' measurements: tables, checks, and their page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drafters_page, idle_cost
from benchmarks.documents import Document
from benchmarks.drafters_tables import (
    drafters_checks,
    drafters_table,
    drafters_text,
    idle_checks,
    idle_text,
    store_checks,
    stores_text,
)
from benchmarks.measure import Run
from tests.unit.test_speed_results import SESSION

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# tables ---------------------------------------------------------------------------------------------------------------


def run(system: str, number: int, seconds: float, **changes: Any) -> Run:
    given = {"prompts": (0,), "tokens": 100, "steps": 50, "texts": ("a",), "drafted": 200, "accepted": 50}
    return Run(system=system, round=number, temperature=0.0, seconds=seconds, **{**given, **changes})


def piece(*runs: Run, **changes: Any) -> dict[str, Any]:
    names = dict.fromkeys(each.system for each in runs)
    return {
        **{"family": "demo", "workload": "code-editing", "prediction": "", "temperature": 0.0, "plan": "auto"},
        **{"limits": [24, 8], "requests": 1, "tokens": 100, "known": {"prompt": 0.9, "answers": 0.2, "either": 0.95}},
        "settings": dict.fromkeys(names, "") | ({"hf-lookup": "n=2"} if "hf-lookup" in names else {}),
        "runs": [asdict(each) for each in runs],
        **changes,
    }


def rows(text: str) -> dict[str, list[str]]:
    """First word of each line -> the other words."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_a_line_tells_of_steps_rates_and_ratios() -> None:
    plain = [run("plain", n, 1.0 * pace, steps=100, drafted=0, accepted=0) for n, pace in enumerate((1, 2, 1))]
    ngram = [run("ngram", n, 0.5 * pace) for n, pace in enumerate((1, 2, 0.5))]
    hf = [run("hf", n, 4.0, steps=100, drafted=None, accepted=None, texts=("b",)) for n in range(3)]
    lookup = [run("hf-lookup", n, 2.0, drafted=None, accepted=None, texts=("b",)) for n in range(3)]
    text = drafters_table(piece(*plain, *ngram, *hf, *lookup))
    found = rows(text)
    assert found["plain"] == ["1.00", "100.0", "1.00", "1.00..1.00", "-", "-", "-", "1/1"]
    assert found["ngram"] == ["2.00", "200.0", "2.00", "2.00..4.00", "-", "4.0", "25%", "1/1"]
    assert found["hf"] == ["1.00", "25.0", "0.25", "0.25..0.50", "-", "-", "-", "0/1"]
    assert found["hf-lookup"] == ["2.00", "50.0", "0.50", "0.50..1.00", "2.00", "-", "-", "0/1"]
    assert found["hf-lookup:"] == ["n=2"]
    assert "90% stands in its prompt, 20% in an earlier answer, 95% in one of them" in text
    assert "demo, code-editing, temperature 0, plan auto" in text


def test_predictions_are_judged_by_tokens_per_step() -> None:
    def predicted(kind: str, steps: int) -> dict[str, Any]:
        runs = [run("prediction", n, 1.0, steps=steps) for n in range(2)]
        return piece(run("plain", 0, 1.0), *runs, run("prediction+ngram", 0, 1.0, steps=1), prediction=kind)

    checks = drafters_checks([predicted("own", 10), predicted("edited", 25), predicted("", 1)])
    assert [(check.bound, check.measured, check.passed) for check in checks] == [(8.0, 10.0, True), (5.0, 4.0, False)]
    text = drafters_text([predicted("own", 10)])
    assert "predicted by its own answer" in text
    assert "pass" in text
    assert "requirement" not in drafters_text([piece(run("plain", 0, 1.0))])


def idle_piece(shares: list[float], median: float) -> dict[str, Any]:
    rounds = [asdict(idle_cost.Round(10, 20, 1.0, share, median)) for share in shares]
    plain = [asdict(idle_cost.Round(20, 20, 0.5, 0.0, 0.0)) for _ in shares]
    return {
        **{"family": "demo", "plan": "auto", "temperature": 1.0, "drafters": "ngram"},
        **{"rounds": rounds, "plain": plain},
    }


def test_idle_drafters_are_judged_by_all_steps_and_by_the_median_one() -> None:
    good, poor = idle_piece([0.01, 0.03, 0.015], 0.001), idle_piece([0.03, 0.03], 0.019)
    assert [check.passed for check in idle_checks([good, poor])] == [True, True, False, True]
    found = rows(idle_text([good]))
    assert found["ngram"] == ["1.50%", "1.00%..3.00%", "0.10%", "1833.3", "2.00", "0.50", "0.50..0.50"]


def store_piece(most: float, bound: float | None, microseconds: float) -> dict[str, Any]:
    tokens = 1000
    return {
        **{"drafters": "suffix", "requests": 10, "tenants": 2, "tokens": tokens, "answered": 600, "steps": 300},
        **{"seconds": tokens * microseconds / 1e6, "token_seconds": [microseconds / 1e6] * 10, "mapped": 0},
        **{"growth": [0, int(most * 2**20), 2**20], "bound": None if bound is None else int(bound * 2**20)},
    }


def test_stores_are_judged_by_memory_and_time() -> None:
    pieces = [store_piece(30, 32, 20), store_piece(33, 32, 51), store_piece(33, None, 1)]
    assert [check.passed for check in store_checks(pieces)] == [True, True, False, False, True]
    found = rows(stores_text(pieces[:1]))
    assert found["suffix"] == [
        "10",
        "1000",
        "30.0",
        "MB",
        "1.0",
        "MB",
        "0.0",
        "MB",
        "32.0",
        "MB",
        "20.00",
        "66.67",
        "20.00",
        "2.00",
    ]


# the page -------------------------------------------------------------------------------------------------------------


def test_tables_are_written_between_the_marks_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Head\n\n{drafters_page.MARKS.begin}\nold\n{drafters_page.MARKS.end}\n\n## Tail\n")
    results = tmp_path / "drafters.json"
    Document("drafters", [SESSION], [{**piece(run("plain", 0, 1.0)), "session": 0}]).save(results)
    for _ in range(2):
        assert drafters_page.main([str(results), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"# Head\n\n{drafters_page.MARKS.begin}\n\n### On texts that repeat\n")
    assert text.endswith(f"{drafters_page.MARKS.end}\n\n## Tail\n")
    assert "old" not in text
    assert text.count("    demo, code-editing") == 1
    assert "Not measured (`python -m benchmarks.idle_cost`)." in text
    assert SESSION["command"] in text


def test_the_projects_page_has_the_marks() -> None:
    text = drafters_page.PAGE.read_text(encoding="utf-8")
    assert "### new" in drafters_page.MARKS.replaced(text, "### new", drafters_page.PAGE)


@pytest.mark.parametrize(
    ("kind", "page", "message"),
    [
        ("matrix", f"{drafters_page.MARKS.begin}{drafters_page.MARKS.end}", "matrix is no result for this page"),
        ("drafters", f"{drafters_page.MARKS.end}{drafters_page.MARKS.begin}", "has no place for measurements"),
    ],
)
def test_a_page_that_cannot_be_written_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, page: str, message: str
) -> None:
    Document(kind, [SESSION], []).save(tmp_path / "it.json")
    (tmp_path / "page.md").write_text(page)
    assert drafters_page.main([str(tmp_path / "it.json"), "--out", str(tmp_path / "page.md")]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page
