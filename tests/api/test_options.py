"""What of a request reaches the engine: defaults, sampling parameters, speculation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from decoding.acceptance import Acceptance
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from tests.api.harness import INFO, api, fake, saying


def reached(body: dict[str, Any], defaults: dict[str, float] | None = None) -> GenerateRequest:
    engine = fake(saying("y"), replace(INFO, default_sampling=defaults or {}))
    with api(engine) as client:
        response = client.post("/v1/completions", json={"prompt": "x", **body})
    assert response.status_code == 200, response.text
    return engine.requests[0]


def test_neutral_defaults() -> None:
    assert reached({"seed": 1}).params == SamplingParams(seed=1)


def test_every_field_arrives() -> None:
    body = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"5": -100, "17": 2.5},
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [4, 6],
        "seed": -5,
        "n": 2,
        "logprobs": 3,
    }
    arrived = {**body, "logit_bias": {5: -100.0, 17: 2.5}, "stop_token_ids": (4, 6)}
    assert reached(body).params == SamplingParams(**arrived)  # type: ignore[arg-type]


def test_the_models_defaults_fill_what_was_left_out() -> None:
    defaults = {"temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "repetition_penalty": 1.05, "min_p": 0.01}
    filled = reached({}, defaults).params
    assert (filled.temperature, filled.top_k, filled.top_p) == (0.6, 20, 0.95)
    assert isinstance(filled.top_k, int)
    assert (filled.repetition_penalty, filled.min_p) == (1.05, 0.01)
    given = reached({"temperature": 0, "top_k": 0, "top_p": 1}, defaults).params
    assert (given.temperature, given.top_k, given.top_p) == (0.0, 0, 1.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, SpeculationParams()),
        (True, SpeculationParams()),
        (False, SpeculationParams(enabled=False)),
        ({}, SpeculationParams()),
        ({"drafters": ["ngram"]}, SpeculationParams(drafters=("ngram",))),
        ({"drafters": []}, SpeculationParams(drafters=())),
        ({"max_nodes": 8, "max_depth": 0}, SpeculationParams(max_nodes=8, max_depth=0)),
        ({"acceptance": {"rule": "exact"}}, SpeculationParams(acceptance=Acceptance())),
        ({"acceptance": {"rule": "typical"}}, SpeculationParams(acceptance=Acceptance("typical", 0.09, 0.3, "keyed"))),
        (
            {"acceptance": {"rule": "typical", "epsilon": 1, "delta": 0.5, "bonus": "argmax"}, "max_nodes": 8},
            SpeculationParams(max_nodes=8, acceptance=Acceptance("typical", 1.0, 0.5, "argmax")),
        ),
        ({"coupling": False}, SpeculationParams(coupling=False)),
        ({"coupling": True, "acceptance": None}, SpeculationParams(coupling=True)),
    ],
)
def test_speculation(given: Any, expected: SpeculationParams) -> None:
    assert reached({"speculation": given}).speculation == expected


def test_echo_with_logprobs_asks_for_the_prompts() -> None:
    assert reached({"echo": True, "logprobs": 2}).params.prompt_logprobs == 2
    assert reached({"echo": True}).params.prompt_logprobs is None
    assert reached({"logprobs": 2}).params.prompt_logprobs is None


def test_cache_salt() -> None:
    assert reached({"cache_salt": "tenant"}).cache_salt == "tenant"


def test_request_ids_of_the_engine_are_not_the_clients() -> None:
    engine = fake(saying("y"))
    with api(engine) as client:
        for _ in range(2):
            client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "same"})
    assert len({request.request_id for request in engine.requests}) == 2
