"""The workloads of the drafters' table: what is shipped, how it is made, and what is told of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import workload_files
from benchmarks.make_workloads import COMMIT, made_of, sources, write
from benchmarks.workload_files import RUN, Request, Workload, edited, known_shares, load, predicting
from benchmarks.workload_texts import (
    FRESH,
    SHOWN,
    STEPS,
    WIDTH,
    Chunk,
    agentic_repetition,
    code_editing,
    frequent_names,
    passages_of,
    renamed,
    retrieval_answers,
    source_chunks,
)
from decoding.errors import ConfigError
from tests.engines import demo_tokenizer

ROOT = Path(__file__).parents[2]
CONTEXT = 1024  # of the demo target
NAMES = ("agentic-repetition", "code-editing", "retrieval-answers")

METHOD = '''\
    def add_{0}(self, value, count):
        """Adds the value so many times as count says, and keeps it."""
        for number in range(count):
            self.values.append(value + number)  # value by value
        result = sum(self.values) + count
        return result

'''
CLASS = "class Sums{0}:\n    def __init__(self, values):\n        self.values = values\n\n" + METHOD * 4
SMALL = "class Small{0}:\n    def __init__(self, values):\n        self.values = values\n\n" + METHOD
PROSE = "The {0} paragraph of a page speaks of [nodes](trees.md), **tokens** and steps, and of what a step costs. " * 4
PAGE = "# Title\n\n" + "\n\n".join(
    [
        "```python\nThis = 'is code'\n\nAnd = 'so is this'\n```",
        *(f"## Part {number}\n\n{PROSE.format(number)}\n\n- a list\n\n| a | table |" for number in range(7)),
        "Short.",
    ]
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def texts() -> dict[str, str]:
    """Made-up sources and pages."""
    found = {f"a/{number}.py": CLASS.format(number) + SMALL.format(number) + "\n\nTHE_END = 1\n" for number in range(7)}
    return {**found, "docs/page.md": PAGE, "docs/other.md": PAGE.replace("page", "leaf")}


# what is shipped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shipped_workloads_are_small_and_fit_the_demo_target(name: str) -> None:
    path = workload_files.FOLDER / f"{name}.jsonl"
    assert path.stat().st_size < 2**20
    workload = load(name, demo_tokenizer())
    assert len(workload.requests) >= 12
    assert workload.longest <= CONTEXT
    assert all(request.tokens >= 32 for request in workload.requests)
    assert workload.predicts is (name == "code-editing")
    assert [request.index for request in workload.requests] == list(range(len(workload.requests)))
    assert len({request.ids for request in workload.requests}) == len(workload.requests)


def test_there_are_three_of_them() -> None:
    assert tuple(workload_files.names()) == NAMES


def test_they_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    try:
        found = sources(ROOT, COMMIT)
    except ConfigError as error:
        pytest.skip(str(error))  # no git, or a clone without history
    write(made_of(found, chosen=True), tmp_path)
    for name in NAMES:
        shipped = (workload_files.FOLDER / f"{name}.jsonl").read_bytes()
        assert (tmp_path / f"{name}.jsonl").read_bytes() == shipped


def test_a_checkout_without_the_commit_is_told_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="git fetch --unshallow"):
        sources(tmp_path, COMMIT)


def test_files_are_written_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(made_of(texts(), chosen=False), tmp_path / "deep")
    assert sorted(path.stem for path in (tmp_path / "deep").iterdir()) == list(NAMES)
    assert "code-editing.jsonl: 7 requests" in capsys.readouterr().out


# how they are made ----------------------------------------------------------------------------------------------------


def test_the_same_texts_give_the_same_lines() -> None:
    made = made_of(texts(), chosen=False)
    assert made == made_of(dict(reversed(texts().items())), chosen=False)
    assert {name: len(lines) > 0 for name, lines in made.items()} == dict.fromkeys(NAMES, True)
    assert {name: len(lines) for name, lines in made_of(texts(), chosen=True).items()} == dict.fromkeys(NAMES, 0)


def test_chunks_are_whole_and_know_what_precedes_their_last_body() -> None:
    code = "import os\n\n@decorated(\n    1\n)\nclass A:\n    x = 1\n\n"
    code += "    def f(\n        self,\n    ):\n        return 1\n\n"
    found = list(source_chunks({"m.py": code + "def g():\n    return 2\n"}))
    assert [(chunk.name, chunk.text[:10]) for chunk in found] == [("A", "@decorated"), ("g", "def g():\n ")]
    assert found[0].text.endswith("        return 1\n")
    assert found[0].written.endswith("    ):\n")
    assert found[1].written == ""


def test_names_are_variables_that_are_seen_often() -> None:
    code = "def f(value, x):\n    x = sum(value) + value\n    Total = value\n    return print(Total, x)\n"
    assert frequent_names(code, 1, code) == ["value"]
    assert frequent_names(code, 4, code) == ["value"]
    assert frequent_names(code, 5, code) == []
    assert frequent_names(code, 1, "nothing of it") == []
    assert renamed("value values value_2 (value)", "value", "x") == "x values value_2 (x)"


def test_an_edit_is_shown_twice_and_begun_once_more() -> None:
    (line,) = code_editing(source_chunks({"a.py": SMALL.format(0)}))
    old, new = line["rename"]
    original = SMALL.format(0).removesuffix("\n")
    assert new in [form.format(old) for form in FRESH]
    head, _, copy = line["prompt"].rpartition(f"after `{old}` became `{new}`\n")
    (first, first_new), _ = re.findall(r"after `(\w+)` became `(\w+)`", line["prompt"])
    before = renamed(original, first, first_new)
    assert original in head
    assert before in head
    assert before != original
    assert new in copy
    assert before.endswith(line["prediction"])
    assert copy + renamed(line["prediction"], old, new) == renamed(before, old, new)
    assert 0 < line["max_tokens"] <= len(line["prediction"]) / 3


def test_what_is_too_long_or_has_too_few_names_is_not_edited() -> None:
    assert list(code_editing([Chunk("a", "b", "short", ""), *source_chunks({"a.py": CLASS.format(0)})])) == []
    assert list(code_editing([Chunk("a", "b", "def f(value):\n" + "    return value\n" * 20, "")])) == []


def test_a_session_edits_one_class_again_and_again() -> None:
    lines = list(agentic_repetition(source_chunks(texts_of_code())))[: 2 * STEPS]
    assert [line["session"] for line in lines] == [0] * STEPS + [1] * STEPS
    for step, line in enumerate(lines[:STEPS]):
        assert line["prompt"].count("# Step ") == step
        assert line["prompt"].splitlines()[-1].startswith("    def add_0(self, ")
        assert "return result" not in line["prompt"].rpartition("def add_0")[2]
    assert len({line["prompt"].partition("class")[2] for line in lines[:STEPS]}) == STEPS


def texts_of_code() -> dict[str, str]:
    return {path: text for path, text in texts().items() if path.endswith(".py")}


def test_passages_are_prose_without_its_marks() -> None:
    found = list(passages_of({"docs/page.md": PAGE}))
    assert [passage.heading for passage in found] == [f"Part {number}" for number in range(7)]
    for passage in found:
        assert not set("[]()*|`") & set(passage.text)
        assert "speaks of nodes, tokens" in passage.text.replace("\n", " ")
        assert max(map(len, passage.text.splitlines())) <= WIDTH


def test_modules_say_something_of_themselves() -> None:
    said = PROSE.format(1).strip()
    code = f'"""A line.\n\n{said}\n\n    an example\n"""\n\n# {said}\nx = 1\n'
    (found,) = passages_of({"decoding/step.py": code})
    assert (found.page, found.heading, found.text[:9]) == ("decoding/step.py", "step", "The 1 par")


def test_answers_quote_a_passage_that_the_prompt_has() -> None:
    passages = list(passages_of({"docs/page.md": PAGE}))
    lines = list(retrieval_answers(passages))
    assert len(lines) == len(passages) - SHOWN + 1
    places = set()
    for wanted, line in zip(passages, lines, strict=False):
        begun = line["prompt"].rpartition('ANSWER = """\n')[2]
        assert begun == wanted.text.splitlines()[0] + "\n"
        assert line["prompt"].count(wanted.text) == 1
        assert line["prompt"].count('ANSWER = """\n') == 2
        places.add(line["prompt"].partition(wanted.text)[0].count("PASSAGE_"))
    assert places == set(range(1, SHOWN + 1))


# reading them ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "import os\n", "max_tokens": 9, "prediction": "import sys\n"}, {"prompt": "x", "max_tokens": 4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_workload_of_ones_own(own: Path) -> None:
    workload = load(str(own), demo_tokenizer())
    first, second = workload.requests
    assert workload.name == "own"
    assert first.ids == tuple(demo_tokenizer().encode("import os\n"))
    assert first.prediction == tuple(demo_tokenizer().encode("import sys\n", add_special_tokens=False))
    assert (first.tokens, second.tokens, second.prediction) == (9, 4, ())
    assert workload.longest == len(first.ids) + 9
    cut = workload.first(1, 5)
    assert [request.tokens for request in cut.requests] == [5]
    assert [request.tokens for request in workload.first(None, 5).requests] == [5, 4]


@pytest.mark.parametrize(
    "line",
    ["", "nothing", "[1]", '{"prompt": "x"}', '{"prompt": "", "max_tokens": 3}', '{"prompt": "x", "max_tokens": 0}',
     '{"prompt": "x", "max_tokens": "3"}', '{"prompt": "x", "max_tokens": 3, "prediction": 1}'],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(own: Path, line: str) -> None:
    own.write_text(own.read_text() + line + "\n")
    with pytest.raises(ConfigError, match="line 3 is no request"):
        load(str(own), demo_tokenizer())


def test_a_workload_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'code-editing'"):
        load("code-edits", demo_tokenizer())
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        load(str(tmp_path / "none.jsonl"), demo_tokenizer())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        load(str(tmp_path / "empty.jsonl"), demo_tokenizer())


# what is told of them -------------------------------------------------------------------------------------------------


def workload(*prompts: list[int]) -> Workload:
    requests = (Request(index, tuple(ids), 1, 30) for index, ids in enumerate(prompts))
    return Workload("made up", tuple(requests))


def test_what_is_known_beforehand_lies_in_runs() -> None:
    prompt, new = list(range(100)), list(range(500, 530))
    assert known_shares(workload(prompt), [prompt[10:40]]) == {"prompt": 1.0, "answers": 0.0, "either": 1.0}
    assert known_shares(workload(prompt), [new])["either"] == 0.0
    short = prompt[: RUN - 1] + new + prompt[50 : 50 + RUN]
    assert known_shares(workload(prompt), [short])["prompt"] == pytest.approx(RUN / len(short))
    again = known_shares(workload(prompt, [1, 2]), [new, new[:20] + prompt[:20]])
    assert again == {"prompt": 0.0, "answers": pytest.approx(20 / 70), "either": pytest.approx(20 / 70)}


def test_one_line_in_twenty_is_edited() -> None:
    text = "\n".join(f"    line number {number} of all" for number in range(60))
    (whole,) = edited([text])
    changed = [(a, b) for a, b in zip(text.split("\n"), whole.split("\n"), strict=True) if a != b]
    assert changed == [(f"    line number {n} of all", "    line number edited of all") for n in (9, 29, 49)]
    pieces = edited(["\n".join(text.split("\n")[first : first + 6]) for first in range(0, 60, 6)])
    assert "\n".join(pieces) == whole


def test_predictions_are_put_in_place_of_others() -> None:
    one = workload([1, 2], [3])
    ids = [request.prediction for request in predicting(one, ["import os", ""], demo_tokenizer()).requests]
    assert ids == [tuple(demo_tokenizer().encode("import os", add_special_tokens=False)), ()]
