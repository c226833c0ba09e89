"""The drafters' table, idle cost and bounds of stores: words, systems, and one tiny run of each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import drafters, idle_cost, store_bounds
from benchmarks.drafters_tables import (
    drafters_checks,
    drafters_text,
    idle_text,
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
from tests.unit.test_drafters_tables import run

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


follows_predictions = pytest.mark.skipif("prediction" not in DRAFTERS, reason="no drafter follows predictions")


@follows_predictions
def test_predictions_go_to_the_engines_that_follow_them() -> None:
    case = Request(0, (5, 6, 7), 1, 4, prediction=(8, 9))
    task = Task(0, 0.0, (case,), 4)
    wanted: Any = demo_system("prediction").request("0", case, task)
    other: Any = demo_system("ngram").request("0", case, task)
    assert (wanted.prediction_ids, other.prediction_ids) == ((8, 9), ())


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


@follows_predictions
def test_predictions_are_measured_as_they_are_as_the_answer_and_edited(tmp_path: Path) -> None:
    words = ["--threads", "1", "--rounds", "1", "--requests", "2", "--workloads", "code-editing"]
    words += ["--plan", "fixed:nodes=16,depth=16", "--drafters", "ngram", "prediction", "--out"]
    document = drafters.bench(drafters.parse([*words, str(tmp_path / "it.json")]), ["it"])
    assert [found["prediction"] for found in document.pieces] == ["", "own", "edited"]
    assert [list(found["settings"]) for found in document.pieces] == [
        ["plain", "ngram", "prediction"],
        ["plain", "prediction"],
        ["plain", "prediction"],
    ]
    own, edited = drafters_checks(document.pieces)
    assert own.measured is not None
    assert edited.measured is not None
    assert own.measured >= edited.measured > 1


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


def test_stores_say_what_they_may_take() -> None:
    assert store_bounds.bound_of(["suffix:max_cache_mb=3"], 100) == 3 * 2**20
    assert store_bounds.bound_of(["recycling:top_k=4,salts=2"], 100) == 2 * 100 * 4 * (1 + 4)
    assert store_bounds.bound_of(["ngram", "recycling:salts=1", "suffix:max_cache_mb=1"], 10) == 2**20 + 360
    assert store_bounds.bound_of(["ngram", "lookahead"], 100) is None


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
