"""OpenAI's ``prediction``: what of it reaches the engine, and what ``usage`` says it was worth."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from decoding.messages import DrafterStats, SpeculationStats
from decoding.request import GenerateRequest
from tests.api.harness import INFO, api, events, fake, ids, saying, tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 8},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
}
CODE = "def add(a, b):\n    return a + b\n"
STATS = SpeculationStats(4, 30, 14, {"prediction": DrafterStats(20, 12), "ngram": DrafterStats(15, 5)})


def content(value: Any) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": value}}


def reached(url: str, body: dict[str, Any]) -> GenerateRequest:
    engine = fake(saying("y"))
    with api(engine) as client:
        response = client.post(url, json={**ASK[url], **body})
    assert response.status_code == 200, response.text
    [request] = engine.requests
    return request


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_the_text_arrives_in_tokens(url: str) -> None:
    parts = [{"type": "text", "text": CODE[:9]}, {"type": "text", "text": CODE[9:]}]
    for value in (CODE, parts):
        assert reached(url, content(value)).prediction_ids == ids(CODE)
    assert tokenizer().decode(reached(url, content(CODE)).prediction_ids) == CODE


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_no_prediction_and_an_empty_one_are_the_same(url: str) -> None:
    for body in ({}, {"prediction": None}, content(""), content([]), content([{"type": "text", "text": ""}])):
        assert reached(url, body).prediction_ids == ()


def test_a_prediction_longer_than_the_context_is_used_as_far_as_it_goes() -> None:
    text = CODE * 1000
    assert reached(CHAT, content(text)).prediction_ids == ids(text)[: INFO.max_model_len]


def test_every_prompt_and_choice_has_it() -> None:
    engine = fake(saying("y"))
    with api(engine) as client:
        client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2, **content(CODE)})
    assert [request.prediction_ids for request in engine.requests] == [ids(CODE)] * 2


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_usage_says_what_was_accepted_and_what_was_in_vain(url: str, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    with api(saying("a b", " c", stats=STATS)) as client:
        response = client.post(url, json={**ASK[url], "n": 2, **content(CODE), **options})
    usage = (events(response)[-1] if stream else response.json())["usage"]
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 24, "rejected_prediction_tokens": 16}
    assert usage["speculation"]["by_drafter"]["prediction"] == {"drafted": 40, "accepted": 24}


def test_a_server_without_the_drafter_takes_the_field_and_counts_nothing() -> None:
    with api(saying("a b")) as client:
        usage = client.post(COMPLETIONS, json={**ASK[COMPLETIONS], **content(CODE)}).json()["usage"]
        without = client.post(COMPLETIONS, json=ASK[COMPLETIONS]).json()["usage"]
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert "completion_tokens_details" not in without


def test_tokens_that_the_model_does_not_have_are_refused_by_name() -> None:
    few = max(ids("x")) + 1
    assert max(ids(CODE)) >= few, "the prediction needs a later token than the prompt"
    with api(fake(saying("y"), replace(INFO, vocab_size=few))) as client:
        response = client.post(COMPLETIONS, json={**ASK[COMPLETIONS], **content(CODE)})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prediction"


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("value", "param", "code", "message"),
    [
        ("x", "", "invalid_value", "prediction: it must be an object."),
        ([], "", "invalid_value", "it must be an object"),
        ({}, ".type", "missing_required_parameter", "prediction.type is missing"),
        ({"type": "content"}, ".content", "missing_required_parameter", "prediction.content is missing"),
        ({"type": "static", "content": "x"}, ".type", "invalid_value", "prediction.type: it must be 'content'."),
        ({"type": "content", "content": None}, ".content", "invalid_value", "a string or an array of text parts"),
        ({"type": "content", "content": 5}, ".content", "invalid_value", "a string or an array of text parts"),
        ({"type": "content", "content": ["x"]}, ".content.0", "invalid_value", "it must be an object"),
        (
            {"type": "content", "content": [{"type": "text"}]},
            ".content.0.text",
            "missing_required_parameter",
            "missing",
        ),
        ({"type": "content", "content": [{"type": "text", "text": 1}]}, ".content.0.text", "invalid_value", "a string"),
        ({"type": "content", "content": [{"type": "image_url"}]}, ".content.0.type", "unsupported_value", "text only"),
        ({"type": "content", "content": "x", "text": "x"}, ".text", "unknown_parameter", "did you mean|there are"),
    ],
)
def test_another_form_is_refused_by_name(url: str, value: Any, param: str, code: str, message: str) -> None:
    with api() as client:
        response = client.post(url, json={**ASK[url], "prediction": value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("prediction" + param, code)
    assert re.search(message, error["message"])
