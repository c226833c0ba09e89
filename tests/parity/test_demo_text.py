"""The served model at the precisions that people serve: speculation changes no token of the demo target's text.

On CPUs whose packed linears give a row the same bits whatever the number of rows (tests/unit/test_linear.py), this
holds exactly, in bfloat16 too; the fused attention sums in the order of positions, whether keys are a chain or a path.
"""

from __future__ import annotations

import json
from functools import cache

import pytest

from decoding.engine import Engine
from decoding.request import SamplingParams
from models import kernels
from tests.engines import ROOT

SPECULATE = (*(f"{name}={ROOT}/demo/{name}" for name in ("eagle3", "mtp", "medusa", "draft")), "ngram")
PAGES = 2000


@cache
def engine(dtype: str, speculate: tuple[str, ...]) -> Engine:
    return Engine.load(str(ROOT / "demo/target"), dtype=dtype, speculate=speculate, num_pages=PAGES, plan="fixed")


@cache
def prompts() -> list[str]:
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:40:5]]


@pytest.mark.skipif(not kernels.load(), reason="exact only with the fused kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=48, temperature=0.8, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=48, temperature=1.2, seed=2, top_p=0.9, top_k=40, repetition_penalty=1.1),
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_speculation_and_batching_change_no_token(dtype: str, params: SamplingParams) -> None:
    plain = [engine(dtype, ()).generate(prompt, params)[0].token_ids for prompt in prompts()]
    drafted = engine(dtype, SPECULATE)
    assert [drafted.generate(prompt, params)[0].token_ids for prompt in prompts()] == plain
    together = drafted.generate(prompts(), params)
    assert [generation.token_ids for generation in together] == plain
    assert sum(generation.speculation.accepted for generation in together) > 0
    drafted.check()
