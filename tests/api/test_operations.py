"""/health, /metrics, /v1/models, and request ids."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.harness import api, fake, saying


def metrics(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_health_follows_the_engine() -> None:
    engine = fake()
    with api(engine) as client:
        ready = client.get("/health")
        engine.die()
        dead = client.get("/health")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert (dead.status_code, dead.json()["status"]) == (503, "dead")
    assert dead.json()["error"]["code"] == "engine_dead"


def test_models() -> None:
    with api() as client:
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/alias").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["demo", "alias"]
    assert one == listed["data"][1]
    assert set(one) == {"id", "object", "created", "owned_by", "root", "max_model_len"}


def test_metrics_tell_the_engines_numbers_and_the_http_sides() -> None:
    with api(saying("a")) as client:
        client.post("/v1/completions", json={"prompt": "x"})
        client.post("/v1/completions", json={})
        client.get("/no/such/path")
        response = client.get("/metrics")
    found = metrics(response.text)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (found["saccade_ready"], found["saccade_pages_total"], found["saccade_pages_free"]) == (1, 100, 100)
    assert found["saccade_http_requests_total{method=POST,route=/v1/completions,status=200}"] == 1
    assert found["saccade_http_requests_total{method=POST,route=/v1/completions,status=400}"] == 1
    assert found["saccade_http_requests_total{method=GET,route=unknown,status=404}"] == 1
    assert found["saccade_time_to_first_token_seconds_count"] == 1
    assert found["saccade_http_requests_in_flight"] == 1  # the scrape itself


@pytest.mark.parametrize("sent", ["abc-123", "a" * 128])
def test_a_sane_request_id_comes_back(sent: str) -> None:
    with api() as client:
        assert client.get("/health", headers={"x-request-id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", [None, "", "a b", "a" * 129, "<script>"])
def test_other_request_ids_are_made(sent: str | None) -> None:
    with api() as client:
        headers = {} if sent is None else {"x-request-id": sent}
        made = client.get("/health", headers=headers).headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{24}", made)
