"""The import direction models <- decoding <- server, and a few measures of the repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("models", "decoding", "server", "training", "benchmarks", "tests")
MAY_IMPORT = {
    "models": {"models"},
    "decoding": {"decoding", "models"},
    "server": {"server", "decoding"},
    "training": {"training", "decoding", "models"},
}
TEXT_SIDE = {"decoding.config", "decoding.messages", "decoding.errors", "decoding.text", "decoding.request"}
TEXT_SIDE |= {"decoding.acceptance", "decoding.command_line", "decoding.step_counts"}
TEXT_SIDE |= {f"decoding.datastore.{name}" for name in ("build", "corpus", "layout")}  # a corpus is text
TEXT_SIDE |= {"decoding.grammar.compiler"}  # a grammar is text, too
# the engine itself runs or is started here; everything else in server/ speaks to it through an EngineClient
ENGINE_SIDE = {"inprocess_client", "supervisor", "engine_process", "engine_launch", "engine_driver", "offline"}
MAX_FILE_BYTES = 20 * 2**20
MAX_MODULE_LINES = 400


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Names of our modules that a file imports, wherever in it: "decoding.text" for ``from decoding.text import x``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} has a relative import"
            names = [_module(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in OURS)


def _module(package: str, name: str) -> str:
    """``from decoding import text`` imports decoding.text; ``from decoding.text import x`` does, too."""
    inner = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if inner.with_suffix(".py").is_file() or inner.is_dir() else package


def listed_files() -> list[Path]:
    """Files that git tracks or would; all files when this is no git checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("package", list(MAY_IMPORT))
def test_imports_run_one_way(package: str) -> None:
    assert modules(package)
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imports(path)
        if name.split(".")[0] not in MAY_IMPORT[package]
    ]
    assert not wrong


def test_the_server_knows_only_the_text_side_of_decoding() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("server")
        if path.stem not in ENGINE_SIDE
        for name in imports(path)
        if name.split(".")[0] == "decoding" and name not in TEXT_SIDE
    ]
    assert not wrong


def test_the_rules_would_notice(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import os\ndef f():\n    from decoding import config, text\n    import models.tree as tree\n")
    assert list(imports(file)) == ["decoding.config", "decoding.text", "models.tree"]


@pytest.mark.parametrize(
    "module",
    ["benchmarks.load.page", "server.app", "server.cli", "decoding.text", "decoding.request", "decoding.messages"],
)
def test_the_http_process_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"{module} imports torch or transformers"


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for name in OURS for path in modules(name)}
    assert not [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_MODULE_LINES]


def test_files_are_small() -> None:
    assert not [str(path.relative_to(ROOT)) for path in listed_files() if path.stat().st_size > MAX_FILE_BYTES]
