"""What runs the real clients: their versions, their scripts' output, the table; and lm_eval's documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.clients import judge, make_documents, run
from tests.clients.environments import HERE, Client, SetupError, load_clients, prepare

SERVERS = run.Servers("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3", "sk-1")


def client(script: str = "some.py", seconds: float = 20.0) -> Client:
    return Client("some", "a client", ("some==1.2",), script, seconds)


def test_every_client_is_pinned_and_has_its_script() -> None:
    clients = load_clients()
    assert {each.name for each in clients} >= {"openai-2", "openai-3", "openai-node", "litellm", "guidellm", "lm-eval"}
    for each in clients:
        assert (HERE / each.script).is_file()
        assert each.version[0].isdigit()


def test_the_page_names_the_versions_that_are_run() -> None:
    page = (judge.ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    assert not [client.name for client in load_clients() if client.version not in page]


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ('packages = ["some"]\nwhat = "x"\nscript = "x.py"', "some pins no version"),
        ('packages = ["some==1"]\nwhat = "x"\nscript = "x.mjs"', "pins no version"),
        ('packages = ["some==1"]\nwhat = "x"', "script"),
        ('what = "x"\nscript = "x.py"', "packages"),
        ('packages = ["some==1"]\nwhat = "x"\nscript = "x.py"\nversion = "1"', "version"),
    ],
)
def test_a_wrong_entry_is_refused(entry: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "versions.toml"
    path.write_text(f"[some]\n{entry}\n")
    with pytest.raises(ValueError, match=part):
        load_clients(path)


def test_versions_of_both_registries_are_shown() -> None:
    assert Client("a", "", ("a[b,c]==1.2", "d==3"), "a.py").version == "1.2"
    assert Client("a", "", ("@scope/a@1.2",), "a.mjs").version == "1.2"


def script(folder: Path, source: str) -> Client:
    """A client whose environment is this one, and whose script is ``source``."""
    binary = folder / "some" / "bin" / "python"
    binary.parent.mkdir(parents=True)
    binary.symlink_to(sys.executable)
    path = folder / "some.py"
    beginning = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom judge import *\nargs = arguments('')\n"
    path.write_text(beginning + source)
    return client(str(path))


def test_checks_are_told_from_what_else_a_client_prints(tmp_path: Path) -> None:
    source = """
check = Judge()
with check("good"):
    print("{ noise")
print("half a line", end="")
with check("bad"):
    raise ValueError("because")
print(args.demo, args.key)
check.end()
"""
    checks = run.run_script(script(tmp_path, source), SERVERS, tmp_path)
    assert [(check.name, check.passed) for check in checks] == [("good", True), ("bad", False)]
    assert "ValueError: because" in checks[1].detail
    assert "http://127.0.0.1:1 sk-1" in (tmp_path / "out" / "some.log").read_text()


@pytest.mark.parametrize("source", ["", "raise SystemExit(3)", "with Judge()('a'):\n    pass\nraise SystemExit(3)"])
def test_a_script_that_breaks_off_has_failed(source: str, tmp_path: Path) -> None:
    checks = run.run_script(script(tmp_path, source), SERVERS, tmp_path)
    assert not run.Outcome(client(), tuple(checks), 1.0).passed
    assert checks[-1].name == "to the end"


def test_a_script_that_never_ends_has_failed(tmp_path: Path) -> None:
    slow = script(tmp_path, "import time\ntime.sleep(60)")
    (check,) = run.run_script(Client(slow.name, slow.what, slow.packages, slow.script, 0.5), SERVERS, tmp_path)
    assert not check.passed
    assert "not at its end" in check.detail


def test_an_environment_is_made_once_and_anew_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "packages.json").write_text(json.dumps(["some==1.2"]))
    prepare(client(), folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="npm is not installed"):
        prepare(Client("some", "", ("some@1.3",), "x.mjs"), folder)
    assert not (folder / "packages.json").exists()


def test_the_table_tells_who_failed() -> None:
    good = run.Outcome(client(), (run.Check("a", True), run.Check("b", True)), 3.0)
    bad = run.Outcome(client(), (run.Check("a", True), run.Check("b", False)), 3.0)
    heading, first, second, third = run.table([good, bad, run.Outcome(client(), (), 1.0)]).splitlines()
    assert heading.split() == ["client", "version", "what", "it", "is", "checks", "seconds"]
    assert first.split() == ["some", "1.2", "a", "client", "2/2", "3", "pass"]
    assert second.endswith("FAIL")
    assert third.endswith("FAIL")


def test_what_is_chosen() -> None:
    everything = {client.name for client in run.chosen([])}
    assert "vllm" not in everything
    assert {"openai-3", "lm-eval"} <= everything
    assert [client.name for client in run.chosen(["vllm", "openai-3"])] == ["openai-3", "vllm"]


def test_a_client_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["litelm"])
    assert "litelm" in capsys.readouterr().err


def test_the_documents_are_what_their_program_makes() -> None:
    made = list(make_documents.documents())
    assert list(judge.json_lines(make_documents.OUT)) == made
    assert len(made) >= 30
    for document in made:
        assert document["choices"][document["answer"]] == document["target"]
        assert len(set(document["choices"])) == 1 + make_documents.WRONG
        assert document["text"].startswith(document["context"] + document["target"])
