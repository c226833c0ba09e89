"""Logprobs over HTTP are those of the transformers library: what evaluations by likelihood rest on.

Both sides compute in float32, in other orders: each logit, of size 20 at most, is a sum of thousands of roundings of
6e-8 relative size, and differs by some 1e-6. The tolerance is half of the fourth decimal, as of `make clients`, where
lm-evaluation-harness makes the same comparison.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.process.serving import DEMO, ROOT, Served, serving

pytestmark = pytest.mark.process

TOLERANCE = 5e-5
TARGET = ROOT / "demo" / "target"
LINES = (ROOT / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
TEXTS = [json.loads(line)["prompt"] for line in LINES[::12]] + ["# Größe – 漢字 🙂\n", "x"]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(*DEMO, "--dtype", "float32", "--served-model-name", "demo") as served:
        yield served


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the next token at every place of every prompt, [T, V] float32."""
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1) for ids in prompts]


def score(server: Served, prompts: list[list[int]], **fields: Any) -> list[dict[str, Any]]:
    ask = {"prompt": prompts, "echo": True, "logprobs": 3, "max_tokens": 1, "temperature": 0, **fields}
    response = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=60)
    assert response.status_code == 200, response.text
    return [choice["logprobs"] for choice in response.json()["choices"]]


def check(found: dict[str, Any], ids: list[int], expected: torch.Tensor) -> None:
    """The scores of one echoed prompt and of the one token behind it."""
    greedy = int(expected[-1].argmax())
    values = expected[torch.arange(len(ids)), torch.tensor([*ids[1:], greedy])]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(values.tolist(), abs=TOLERANCE)
    best = expected.topk(3, dim=-1).values
    for place, (chosen, top) in enumerate(zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)):
        assert chosen in top.values()  # the very same number: evaluations compare the two to tell what is greedy
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best[place].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("speculation", [True, False])
def test_echoed_prompts_are_scored_as_transformers_scores_them(
    server: Served, prompts: list[list[int]], expected: list[torch.Tensor], speculation: bool
) -> None:
    together = score(server, prompts, speculation=speculation)
    alone = [score(server, [ids], speculation=speculation)[0] for ids in prompts]  # beginnings lie in the cache by now
    for found in (together, alone):
        for scores, ids, values in zip(found, prompts, expected, strict=True):
            check(scores, ids, values)


def test_a_prompt_alone_is_scored_alike(server: Served, prompts: list[list[int]], expected: list[torch.Tensor]) -> None:
    for scores, ids, values in zip(score(server, prompts, max_tokens=0), prompts, expected, strict=True):
        assert len(scores["tokens"]) == len(ids)
        wanted = values[torch.arange(len(ids) - 1), torch.tensor(ids[1:], dtype=torch.long)].tolist()
        assert scores["token_logprobs"][1:] == pytest.approx(wanted, abs=TOLERANCE)


def test_an_end_of_text_that_was_made_is_scored_too(server: Served, prompts: list[list[int]]) -> None:
    ids = prompts[0]
    (scores,) = score(server, [ids], logit_bias={"0": 100})
    assert len(scores["token_logprobs"]) == len(ids) + 1
    assert scores["tokens"][-1] == "<|endoftext|>"
    assert scores["token_logprobs"][-1] < -1  # the model's own opinion, without the bias
