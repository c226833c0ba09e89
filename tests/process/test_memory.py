"""Memory over many requests that come, go and are cancelled: every page returns, and the process does not grow."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import random
from collections import Counter
from pathlib import Path

import pytest

from decoding.engine import Engine
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from tests.engines import ROOT

WARM_UP = 150  # requests; oneDNN keeps a kernel for every row count that it has met, which takes a while to level off
REQUESTS = 200  # after those
LAST = WARM_UP + REQUESTS - 1
AT_ONCE = 8
PAGES = 20  # few, so that all of them are written early, and eviction and preemption take part
MAX_GROWTH = 6 * 2**20  # bytes; a leak of one step's logits in each of 100 requests would be 20 times that


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free within the heap is not resident
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def random_request(number: int, dice: random.Random, prompts: list[list[int]]) -> GenerateRequest:
    prompt = dice.choice(prompts)
    params = SamplingParams(
        max_tokens=dice.randint(1, 24),
        temperature=dice.choice([0.0, 0.7, 1.2]),
        top_p=dice.choice([1.0, 0.9]),
        presence_penalty=dice.choice([0.0, 0.0, 0.5]),
        logprobs=dice.choice([None, None, 3]),
        n=dice.choice([1, 1, 2]),
        stop_token_ids=dice.choice([(), tuple(prompt[:3])]),
        seed=number,
    )
    wish = dice.choice([SpeculationParams(), SpeculationParams(), SpeculationParams(drafters=("ngram",))])
    return GenerateRequest(f"r{number}", tuple(prompt[: dice.randint(1, 90)]), params, wish)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/status").exists(),
    reason="resident memory is read from Linux's /proc, and trimmed by glibc",
)
def test_200_requests_leave_nothing_behind() -> None:
    engine = Engine.load(
        f"{ROOT}/demo/target",
        dtype="float32",
        speculate=(f"draft={ROOT}/demo/draft", "ngram"),
        num_pages=PAGES,
        max_num_seqs=AT_ONCE,
        max_num_batched_tokens=64,
    )
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:12]
    prompts = [engine.tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
    dice, ends, expected = random.Random(1), Counter[str](), 0
    halfway = 0
    for number in range(WARM_UP + REQUESTS):
        request = random_request(number, dice, prompts)
        expected += request.params.n
        engine.submit(request)
        if dice.random() < 0.3:  # of those before it, perhaps waiting, perhaps half done, perhaps ended
            victim = f"r{dice.randint(max(0, number - 10), number)}"
            ends.update(event.finish_reason for event in engine.cancel(victim, dice.choice([None, 0])))
        while engine.stats().waiting > dice.randint(0, 4) or (number == LAST and engine.has_work):
            ends.update(event.finish_reason for event in engine.step() if event.finish_reason)
            engine.check()
        if number == WARM_UP + REQUESTS // 2:
            halfway = resident_bytes()
    growth = resident_bytes() - halfway

    assert sum(ends.values()) == expected, "every choice ends once"
    assert set(ends) == {"stop", "length", "cancelled"}
    assert ends["cancelled"] > 20
    stats = engine.stats()
    assert stats.requests_finished == expected
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total == PAGES
    engine.check()
    assert growth < MAX_GROWTH
    for drafter in engine._stepper.drafters.members:
        kept = getattr(drafter, "_drafted", {})
        assert not kept, "drafters forget what has ended"
    assert not engine._stepper.sampler.noise._slot
