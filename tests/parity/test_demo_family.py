"""The demo's drafters are accepted as often as when they were made, and change no token.

What a misplaced norm, tap or position costs is acceptance alone, silently; these bounds are a tenth below what
demo/CARD.md's models reach on these prompts, so that such a mistake in serving shows.
"""

from __future__ import annotations

import json
from functools import cache

import pytest

from decoding.engine import Engine
from decoding.request import SamplingParams
from models import kernels
from tests.engines import ALL_NODES, ROOT

LENGTH = 48
WHOLE_TREES = "depth=6,beam=4,top_k=8,min_confidence=0"
FAMILY = {
    "medusa": (f"medusa={ROOT}/demo/medusa", 2.0, 1.75),
    "mtp": (f"mtp={ROOT}/demo/mtp:{WHOLE_TREES}", 3.9, 3.2),
    "eagle3": (f"eagle3={ROOT}/demo/eagle3:{WHOLE_TREES}", 4.1, 3.0),
    "draft": (f"draft={ROOT}/demo/draft:{WHOLE_TREES}", 3.25, 2.7),
}


@cache
def prompts() -> list[str]:
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[::5]]


def params(temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=LENGTH, temperature=temperature, seed=4, ignore_eos=True)


@cache
def texts(temperature: float) -> list[list[int]]:
    engine = Engine.load(f"{ROOT}/demo/target", num_pages=2000)
    return [list(done.token_ids) for done in engine.generate(prompts(), params(temperature))]


@pytest.mark.skipif(not kernels.load(), reason="bfloat16 text is exact only with the fused kernels")
@pytest.mark.parametrize("name", list(FAMILY))
def test_the_family_drafts_as_it_was_trained_to(name: str) -> None:
    drafter, greedy, sampled = FAMILY[name]
    engine = Engine.load(f"{ROOT}/demo/target", speculate=(drafter,), max_nodes=32, plan=ALL_NODES, num_pages=2000)
    for temperature, bound in ((0.0, greedy), (1.0, sampled)):
        done = engine.generate(prompts(), params(temperature))
        assert [list(each.token_ids) for each in done] == texts(temperature)
        steps = sum(each.speculation.steps for each in done)
        assert LENGTH * len(done) / steps >= bound
