"""What the pages say works, works."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.inflate_shapes import Shape
from decoding.assemble import build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters import DRAFTERS
from decoding.drafters.base import DrafterContext
from decoding.engine import Engine
from decoding.request import SamplingParams
from server.cli import main
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "demo" / "CARD.md"])
PARAMS = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def slugs(page: Path) -> set[str]:
    """What a link may have behind a #: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    pages = {link: page.parent / link if link else page for link, _ in links if "://" not in link}
    missing = [f"{link}#{place}" for link, place in links if link in pages and place not in slugs(pages[link])]
    assert not missing


TRAINED = ("draft", "medusa", "mtp", "eagle", "eagle3")  # they have pages of their own
# of docker, compose, ray, torchrun and vLLM
OTHERS = {"build", "build-arg", "cpus", "enable-auto-tool-choice", "entrypoint", "gpus", "head", "include-dashboard"}
OTHERS |= {"no-healthcheck", "nproc-per-node", "rm", "stop-timeout"}
OF_OTHER_PROGRAMS = "clients.md"  # a page full of their flags


@cache
def own_flags() -> set[str]:
    """Those that commands tell of when asked for help, and those that sources spell."""
    told = io.StringIO()
    for command in ("serve", "generate", *(f"train {recipe}" for recipe in RECIPES)):
        with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
            main([*command.split(), "--help"])
    spelled = [path for folder in ("server", "benchmarks", "training") for path in (ROOT / folder).rglob("*.py")]
    literal = "\n".join(path.read_text(encoding="utf-8") for path in spelled)
    found = re.findall(r"--([a-z][a-z0-9-]+)", told.getvalue()) + re.findall(r"\"--([a-z][a-z0-9-]+)\"", literal)
    return set(found) | {each.name.replace("_", "-") for each in fields(Shape)}


@pytest.mark.parametrize("page", [each for each in PAGES if each.name != OF_OTHER_PROGRAMS], ids=lambda page: page.name)
def test_flags_are_there(page: Path) -> None:
    told = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", page.read_text(encoding="utf-8")))
    assert not sorted(told - own_flags() - OTHERS)


OPTIONS = [  # page, heading, drafter
    *(("drafters-without-training.md", f"## {name}", name) for name in DRAFTERS if name not in TRAINED),
    ("medusa.md", "## Options", "medusa"),
    ("eagle.md", "## Options", "eagle3"),
]


@pytest.mark.parametrize(("page", "heading", "drafter"), OPTIONS, ids=lambda each: each)
def test_options_of_drafters_are_those_of_their_tables(page: str, heading: str, drafter: str) -> None:
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    place = rows[0].index("default")
    told = {row[0].strip("`"): row[place].strip("`") for row in rows if re.fullmatch(r"`\w+`", row[0])}
    there = {each.name: each.default for each in fields(DRAFTERS[drafter]().options)}
    assert told.keys() <= there.keys()
    assert told.keys() >= there.keys() - {"path"}
    for name, default in told.items():
        assert default == ("none" if there[name] in ("", None) else str(there[name])), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = [
        name.replace(".", "/") for name in re.findall(r"python -m ((?:benchmarks|training|tests|models)[\w.]*)", text)
    ]
    missing = [name for name in modules if not ((ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file())]
    targets = set(re.findall(r"^([a-z][\w -]*?):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    known = {name for each in targets for name in each.split()}
    missing += [name for name in re.findall(r"(?:`|    )make ([a-z][a-z-]+)", text) if name not in known]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(block)


def example(page: str, number: int, path: Path) -> Any:
    """A page's Python block as a module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    path.write_text(blocks[number])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_drafter_of_the_guide_drafts_and_changes_nothing(tmp_path: Path) -> None:
    echo = example("docs/add-a-drafter.md", 0, tmp_path / "echo_drafter.py")
    config = EngineConfig(str(ROOT / "demo" / "target"), num_pages=80, dtype="float32", plan="fixed")
    loaded = load_target(config)
    target = loaded.target
    context = DrafterContext(
        "echo", 0, target, loaded.tokenizer, target.dtype, target.device, "auto", target.max_model_len, 2048
    )
    prompt = "x = 0\n" + "\n" * 8
    texts = []
    for drafters in ([], [echo.EchoDrafter(echo.EchoOptions(), context)]):
        engine = Engine(config, loaded, build_stepper(config, loaded, drafters))
        generation = engine.generate(prompt, PARAMS)[0]
        texts.append(generation.text)
        engine.check()
    assert texts[0] == texts[1]
    assert generation.speculation.by_drafter["echo"].drafted > 0
