"""What the pages say works, works."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from decoding.assemble import build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.base import DrafterContext
from decoding.engine import Engine
from decoding.request import SamplingParams

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "demo" / "CARD.md"])
PARAMS = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


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
