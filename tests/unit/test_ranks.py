"""Ranks among the whole vocabulary, of the prompt's tokens and of the text's."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from decoding.messages import TokenLogprobs
from decoding.request import GenerateRequest, SamplingParams
from models.decoder import Decoder
from tests.engines import make_engine, run, tiny_decoder

PROMPT = tuple(range(2, 40, 3))


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


def check(entry: TokenLogprobs) -> None:
    """The token stands in the list of the best at its rank, or below all of them."""
    better = [token for token, logprob in entry.top if logprob > entry.logprob]
    assert entry.rank == len(better) + 1 if entry.rank <= len(entry.top) else len(better) == len(entry.top)
    if entry.rank <= len(entry.top):
        assert entry.top[entry.rank - 1] == (entry.token_id, entry.logprob)


@pytest.mark.parametrize("step_tokens", [4, 2048])
def test_ranks_of_the_prompt(step_tokens: int) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=20, seed=1)
    engine = make_engine(target(), max_num_batched_tokens=step_tokens)
    told = run(engine, [GenerateRequest("r", PROMPT, params)])["r", 0].events[0].prompt_logprobs
    assert told is not None
    assert told[0] is None
    assert [entry.token_id for entry in told if entry] == list(PROMPT[1:])
    for entry in told[1:]:
        assert entry is not None
        check(entry)
    assert max(entry.rank for entry in told if entry) > 20, "some are told only by their number"


def test_ranks_of_the_text() -> None:
    params = SamplingParams(max_tokens=30, logprobs=20, seed=4, temperature=2.0, ignore_eos=True)
    drawn = run(make_engine(target()), [GenerateRequest("r", PROMPT, params)])["r", 0].logprobs
    assert len({entry.rank for entry in drawn}) > 3
    for entry in drawn:
        check(entry)
    greedy = SamplingParams(max_tokens=30, logprobs=0, temperature=0.0, ignore_eos=True)
    likeliest = run(make_engine(target()), [GenerateRequest("r", PROMPT, greedy)])["r", 0].logprobs
    assert {entry.rank for entry in likeliest} == {1}
