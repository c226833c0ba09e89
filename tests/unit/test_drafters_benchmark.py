"""The drafters' table, idle cost, bounds of stores, and their page: words, tables, and one tiny run of each."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import drafters, drafters_page, idle_cost, store_bounds
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
from benchmarks.family import Family
from benchmarks.measure import Run, Task
from benchmarks.silent_target import PIECE, SilentTarget, spliced_texts
from benchmarks.workload_files import Request
from benchmarks.workload_systems import (
    WITHOUT_TRAINING,
    InOrder,
    WorkloadSystem,
    default_sets,
    label,
    labelled,
    members,
)
from decoding.drafters import DRAFTERS
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.request import GenerateRequest, SamplingParams
from tests.engines import demo_tokenizer
from tests.unit.test_speed_results import SESSION

ROOT = Path(__file__).parents[2]
FAMILY = Family("demo", ROOT / "demo/target", {"draft": ROOT / "demo/draft"})


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# sets of drafters -----------------------------------------------------------------------------------------------------


def test_a_set_is_its_drafters_with_their_options() -> None:
    assert members("ngram") == ("ngram",)
    assert members("ngram:max_match=3+draft=/a+b:depth=2") == ("ngram:max_match=3", "draft=/a+b:depth=2")
    assert members("draft=/x+eagle3") == ("draft=/x", "eagle3")
    assert label("ngram:max_match=3+draft=/a+b:depth=2") == "ngram:max_match=3+draft:depth=2"
    assert label("draft=/a:b/c") == "draft"
    assert labelled(["ngram", "draft=/x"]) == {"ngram": "ngram", "draft": "draft=/x"}
    with pytest.raises(ConfigError, match="leave one of them out"):
        labelled(["draft=/x", "draft=/y"])


def test_by_default_every_drafter_without_training_is_measured_and_all_together() -> None:
    *alone, together = default_sets(FAMILY)
    assert alone == [*(name for name in WITHOUT_TRAINING if name in DRAFTERS), "draft"]
    assert members(together) == tuple(alone)
    assert default_sets(Family("bare", ROOT, {}))[0] == "ngram"


def test_words_with_a_path_and_drafters_without_one_are_passed_on() -> None:
    words = FAMILY.speculate(["draft:depth=2", "ngram:max_match=3", "eagle3=/own:depth=2", "medusa"])
    assert words == (f"draft={ROOT}/demo/draft:depth=2", "ngram:max_match=3", "eagle3=/own:depth=2", "medusa")
    with pytest.raises(ConfigError, match="has no drafter 'eagle3'"):
        FAMILY.speculate(["eagle3"])


# systems --------------------------------------------------------------------------------------------------------------


class FakeServer:
    """Notes what is asked of a server of llama.cpp."""

    name, setting = "llama-ngram", "ngram-mod"

    def __init__(self) -> None:
        self.log: list[str] = []

    def forget(self) -> None:
        self.log.append("forget")

    def timed(self, task: Task) -> Run:
        self.log.append(f"run {task.round}")
        return run("llama-ngram", task.round, 1.0)


def test_a_peer_forgets_between_rounds_and_not_within() -> None:
    server = FakeServer()
    system = InOrder(server)  # type: ignore[arg-type]
    for number in (-1, -1, 0, 0, 1):
        system.run(Task(number, 0.0, (Request(0, (1,), 1, 4),), 4))
    assert server.log == ["forget", "run -1", "run -1", "forget", "run 0", "run 0", "forget", "run 1"]
    assert (system.name, system.setting, system.peer) == ("llama-ngram", "ngram-mod", True)


def demo_system(*speculate: str) -> WorkloadSystem:
    engine = Engine.load(str(ROOT / "demo/target"), speculate=speculate, plan="fixed", num_pages=64)
    return WorkloadSystem("it", engine, "a workload")


def test_every_round_has_a_salt_of_its_own() -> None:
    system, case = demo_system("ngram"), Request(0, (5, 6, 7), 1, 4, prediction=(8, 9))
    asked = [system.request("0", case, Task(number, 0.0, (case,), 4)) for number in (0, 0, 1)]
    assert asked[0] == asked[1]
    assert asked[0].cache_salt != asked[2].cache_salt
    assert "a workload" in asked[0].cache_salt
    assert asked[0].params == SamplingParams(4, 0.0, seed=1, ignore_eos=True)


@pytest.mark.skipif("prediction" not in DRAFTERS, reason="there is no drafter that follows predictions")
def test_predictions_go_to_the_engines_that_follow_them() -> None:
    case = Request(0, (5, 6, 7), 1, 4, prediction=(8, 9))
    task = Task(0, 0.0, (case,), 4)
    wanted: Any = demo_system("prediction").request("0", case, task)
    other: Any = demo_system("ngram").request("0", case, task)
    assert (wanted.prediction_ids, other.prediction_ids) == ((8, 9), ())


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
    page.write_text(f"# Head\n\n{drafters_page.BEGIN}\nold\n{drafters_page.END}\n\n## Tail\n")
    results = tmp_path / "drafters.json"
    Document("drafters", [SESSION], [{**piece(run("plain", 0, 1.0)), "session": 0}]).save(results)
    for _ in range(2):
        assert drafters_page.main([str(results), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"# Head\n\n{drafters_page.BEGIN}\n\n### On texts that repeat\n")
    assert text.endswith(f"{drafters_page.END}\n\n## Tail\n")
    assert "old" not in text
    assert text.count("    demo, code-editing") == 1
    assert "Not measured (`python -m benchmarks.idle_cost`)." in text
    assert SESSION["command"] in text


def test_the_projects_page_has_the_marks() -> None:
    text = drafters_page.PAGE.read_text(encoding="utf-8")
    assert "### new" in drafters_page.replaced(text, "### new", drafters_page.PAGE)


@pytest.mark.parametrize(
    ("kind", "page", "message"),
    [
        ("matrix", f"{drafters_page.BEGIN}{drafters_page.END}", "matrix is no result for this page"),
        ("drafters", f"{drafters_page.END}{drafters_page.BEGIN}", "has no place for measurements"),
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


# tiny runs ------------------------------------------------------------------------------------------------------------

TINY = ["--threads", "1", "--rounds", "1", "--tokens", "12", "--requests", "1"]


def test_the_table_is_measured_with_a_peer_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    words = [*TINY, "--drafters", "ngram", "ngram:max_match=3+draft", "--peers", "transformers", "--resume"]
    words += ["--plan", "fixed", "--out", str(tmp_path / "it.json"), "--workloads"]
    drafters.bench(drafters.parse([*words, "code-editing"]), ["first"])
    document = drafters.bench(drafters.parse([*words, "code-editing", "retrieval-answers"]), ["second"])
    assert [(p["workload"], p["session"]) for p in document.pieces] == [("code-editing", 0), ("retrieval-answers", 1)]
    for found in document.pieces:
        by_name = {each["system"]: each for each in found["runs"]}
        assert list(found["settings"]) == ["plain", "ngram", "ngram:max_match=3+draft", "hf", "hf-lookup"]
        assert set(by_name) == set(found["settings"])
        assert {each["tokens"] for each in found["runs"]} == {12}
        assert by_name["plain"]["steps"] == 12
        assert by_name["ngram"]["texts"] == by_name["plain"]["texts"]
        assert by_name["ngram"]["drafted"] > 0
    assert "retrieval-answers" in drafters_text(document.pieces)
    assert len(drafters.bench(drafters.parse([*words, "code-editing"]), ["third"]).pieces) == 2


def test_idle_cost_is_measured(tmp_path: Path) -> None:
    words = [*TINY, "--prompt-tokens", "16", "--drafters", "ngram", "--resume", "--out", str(tmp_path / "it.json")]
    document = idle_cost.bench(idle_cost.parse([*words, "--plan", "fixed:nodes=4,depth=2"]), ["it"])
    (found,) = document.pieces
    (mine,), (plain,) = found["rounds"], found["plain"]
    assert mine["tokens"] == plain["tokens"] == plain["steps"] == 12
    assert 0 < mine["drafting"] < mine["seconds"]
    assert 0 <= mine["median_share"] < 1
    assert "random prompts, temperature 1" in idle_text(document.pieces)
    assert len(idle_cost.bench(idle_cost.parse([*words, "--plan", "fixed:nodes=4,depth=2"]), ["it"]).pieces) == 1


def test_idle_requests_differ_from_each_other_and_from_round_to_round() -> None:
    options = idle_cost.parse(["--requests", "3", "--prompt-tokens", "5"])
    first, again, other = (idle_cost.random_requests(100, number, 1.0, options) for number in (0, 0, 1))
    assert first == again
    prompts = [request.prompt_ids for request in [*first, *other]]
    assert len(set(prompts)) == 6
    assert {len(prompt) for prompt in prompts} == {5}


def test_stores_are_measured_without_a_model() -> None:
    options = store_bounds.parse(["--requests", "8", "--tokens", "24", "--tenants", "2", "--bound", "64M"])
    found = store_bounds.measure("ngram", options)
    assert (found["requests"], found["tokens"], found["answered"]) == (8, 8 * 56, 8 * 24)
    assert found["bound"] == 64 * 2**20
    assert len(found["growth"]) == 8
    assert len(found["token_seconds"]) == 8
    assert 8 <= found["steps"] <= 8 * 24
    assert found["seconds"] > 0
    assert "ngram" in stores_text([{"drafters": "ngram", **found}])


def test_the_dictated_text_comes_out_whatever_is_drafted() -> None:
    options = store_bounds.parse(["--prompt-tokens", "16", "--tokens", "48"])
    target = SilentTarget(demo_tokenizer().vocab_size, 256)
    engine, rule, timed = store_bounds.build(("ngram",), target, demo_tokenizer(), options)
    text = [token % 50 + 10 for token in range(7)] * 8 + [3, 4, 5, 6, 7, 8, 9, 10]  # says the same again, then not
    rule.begin(text, 16)
    params = SamplingParams(48, 0.0, ignore_eos=True)
    engine.submit(GenerateRequest("it", tuple(text[:16]), params))
    made: list[int] = []
    while engine.has_work:
        for event in engine.step():
            made += event.token_ids
            rule.length += len(event.token_ids)
    assert made == text[16:]
    assert engine.stats().steps < 30
    assert timed[0].seconds > 0


def test_spliced_texts_repeat_a_corpus_and_themselves_never() -> None:
    corpus = list(range(1000, 3000))
    first, again = (list(itertools.islice(spliced_texts(corpus, 300, 100), 3)) for _ in range(2))
    assert first == again
    assert [len(text) for text in first] == [300] * 3
    known = [token for text in first for token in text if token >= 1000]
    assert 0.4 < len(known) / 900 < 1
    followed = sum(b == a + 1 for text in first for a, b in itertools.pairwise(text))
    assert followed > len(known) * (1 - 2 / PIECE[0])


def test_drafters_that_cannot_be_are_errors() -> None:
    with pytest.raises(ConfigError, match="max_match"):
        store_bounds.measure("ngram:max_match=0", store_bounds.parse([]))


@pytest.mark.process
def test_every_set_has_a_process_of_its_own(tmp_path: Path) -> None:
    words = ["--requests", "4", "--tokens", "8", "--resume", "--out", str(tmp_path / "it.json"), "--drafters"]
    document = store_bounds.bench(store_bounds.parse([*words, "ngram", "ngram:max_match=3"]), ["it"])
    assert [found["drafters"] for found in document.pieces] == ["ngram", "ngram:max_match=3"]
    assert len(store_bounds.bench(store_bounds.parse([*words, "ngram"]), ["it"]).pieces) == 2


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (drafters, ["--peers", "lama"], "invalid choice: 'lama'"),
        (drafters, ["--workload", "x"], "--workloads"),
        (drafters, ["--resume"], "name it with --out"),
        (idle_cost, ["--round", "3"], "--rounds"),
        (store_bounds, ["--bound", "much"], "no size"),
    ],
)
def test_a_wrong_command_line_names_the_right_one(
    module: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.parse(words)
    assert message in capsys.readouterr().err
