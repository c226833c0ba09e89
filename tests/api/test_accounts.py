"""What answers tell of themselves: fingerprints, usage in every chunk, the trace of the steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from decoding.messages import StepTrace, TokenEvent
from decoding.request import GenerateRequest, SpeculationParams
from server.fake_client import Line
from server.security import Security
from server.settings import ServerSettings
from tests.api.asking import ASK, CHAT, COMPLETIONS, reached, refused
from tests.api.harness import INFO, SETTINGS, STATS, api, events, fake, ids, saying, tokenizer

# fingerprints and usage ----------------------------------------------------------------------------------------------


def fingerprints(body: dict[str, Any] | None = None, **changes: Any) -> set[str]:
    settings = changes.pop("settings", SETTINGS)
    template = changes.pop("template", None)
    with api(fake(saying("y", "z"), replace(INFO, **changes)), settings, template) as client:
        told = set()
        for url in (COMPLETIONS, CHAT):
            told.add(client.post(url, json={**ASK[url], **(body or {})}).json()["system_fingerprint"])
            told |= {c["system_fingerprint"] for c in events(client.post(url, json={**ASK[url], "stream": True}))}
    return told


def test_one_server_has_one_fingerprint() -> None:
    [found] = fingerprints()
    assert found.startswith("fp_")
    assert fingerprints({"temperature": 0.1, "seed": 5}) == {found}
    assert fingerprints(drafters=()) == {found}, "what drafts does not change the text"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"acceptance": "typical"},
        {"tensor_parallel_size": 2},
        {"default_sampling": {"temperature": 0.5}},
        {"settings": ServerSettings(("demo",), seed=4)},
        {"template": "{{ messages[0].content }}"},
    ],
)
def test_what_can_change_the_text_changes_it(change: dict[str, Any]) -> None:
    assert fingerprints(**change) != fingerprints()


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_continuous_usage_is_each_choice_s_own(url: str) -> None:
    """As in vLLM; the last chunk has the sum of all."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    with api(saying("a", " b", " c")) as client:
        ask = {**ASK[url], "n": 2, "stream": True, "stream_options": options}
        *chunks, last = events(client.post(url, json=ask))
    prompt = last["usage"]["prompt_tokens"]
    for index in range(2):
        own = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in own]
        assert counts == ([1, 2, 3] if url == COMPLETIONS else [0, 1, 2, 3, 3]), "the role, the text, the reason"
        assert all(usage["prompt_tokens"] == prompt for usage in own)
        assert all(usage["total_tokens"] == prompt + usage["completion_tokens"] for usage in own)
    assert last["usage"]["completion_tokens"] == 6


# speculation ---------------------------------------------------------------------------------------------------------

TRACE = (StepTrace(4, (1, 2, 3), (-1, 0, 1), (1.0, 0.123456, 0.9), ((), ("ngram",), ("draft", "ngram")), (1,), 9),)


def tracing(request: GenerateRequest) -> Iterable[Line]:
    for choice in range(request.params.n):
        for place in range(2):
            yield TokenEvent(
                request.request_id,
                choice,
                ids("y"),
                finish_reason="length" if place else None,
                speculation=STATS if place else None,
                trace=(replace(TRACE[0], position=4 + place),) if request.speculation.trace else (),
            )


def traced(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What an answer says beside its usage."""
    told: list[dict[str, Any]] = body["speculation_trace"]
    return told


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("form", ["whole", "stream", "stream with usage"])
def test_a_trace_tells_each_choice_s_steps(url: str, form: str) -> None:
    ask = {**ASK[url], "n": 2, "speculation": {"trace": True}, "stream": form != "whole"}
    if form == "stream with usage":
        ask["stream_options"] = {"include_usage": True}
    with api(tracing) as client:
        response = client.post(url, json=ask)
    if form == "whole":
        told = traced(response.json())
    else:
        *chunks, last = events(response)
        assert last["choices"] == []
        assert ("usage" in last) == (form == "stream with usage")
        assert not any("speculation_trace" in chunk for chunk in chunks)
        told = traced(last)
    assert [each["index"] for each in told] == [0, 1]
    assert [[step["position"] for step in each["steps"]] for each in told] == [[4, 5], [4, 5]]
    name = tokenizer().token_text
    assert told[0]["steps"][0] == {
        "position": 4,
        "tokens": [1, 2, 3],
        "texts": [name(1), name(2), name(3)],
        "parents": [-1, 0, 1],
        "confidence": [1.0, 0.1235, 0.9],
        "drafters": [[], ["ngram"], ["draft", "ngram"]],
        "accepted": [1],
        "bonus": 9,
    }


def test_no_trace_unless_asked_for() -> None:
    with api(tracing) as client:
        assert "speculation_trace" not in client.post(COMPLETIONS, json={"prompt": "x"}).json()
        chunks = events(client.post(COMPLETIONS, json={"prompt": "x", "stream": True}))
    assert all(chunk["choices"] for chunk in chunks)
    assert not any("speculation_trace" in chunk for chunk in chunks)


@pytest.mark.parametrize("body", [{"n": 9}, {"prompt": ["x"] * 3, "n": 3}, {"best_of": 9}])
def test_a_trace_of_too_many_choices(body: dict[str, Any]) -> None:
    refused(COMPLETIONS, {**body, "speculation": {"trace": True}}, "speculation.trace", "8")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"enabled": False}, SpeculationParams(enabled=False)),
        ({"enabled": True, "trace": False}, SpeculationParams()),
        ({"enabled": None, "trace": True}, SpeculationParams(trace=True)),
        ({"enabled": False, "max_nodes": 3, "trace": True}, SpeculationParams(enabled=False, max_nodes=3, trace=True)),
    ],
)
def test_speculation_can_be_switched_in_its_object(given: dict[str, Any], expected: SpeculationParams) -> None:
    assert reached(COMPLETIONS, {"speculation": given}).speculation == expected
    refused(COMPLETIONS, {"speculation": {"enabled": 1}}, "speculation.enabled", "true or false")


# what drafters remember of others -------------------------------------------------------------------------------------

KEYS = Security(api_keys=("sk-a",))


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("security", "body", "told"),
    [
        (Security(), {}, True),
        (KEYS, {}, False),
        (KEYS, {"cache_salt": ""}, False),
        (KEYS, {"cache_salt": "mine alone"}, True),
        (replace(KEYS, isolate_keys=True), {}, True),
        (KEYS, {"speculation": {"trace": True, "drafters": ["ngram"]}}, True),
        (KEYS, {"speculation": {"trace": True, "drafters": ["draft", "ngram"]}}, False),
        (KEYS, {"speculation": {"trace": True, "enabled": False}}, True),
        (KEYS, {"speculation": {"trace": False}}, True),
    ],
)
def test_a_trace_does_not_show_what_other_clients_were_told(
    url: str, security: Security, body: dict[str, Any], told: bool
) -> None:
    engine = fake(tracing, replace(INFO, recalling=("draft",)))
    with api(engine, replace(SETTINGS, security=security)) as client:
        ask = {**ASK[url], "speculation": {"trace": True}, **body}
        response = client.post(url, json=ask, headers={"Authorization": "Bearer sk-a"})
    if told:
        assert response.status_code == 200, response.text
        return
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "speculation.trace")
    assert "cache_salt" in error["message"]
