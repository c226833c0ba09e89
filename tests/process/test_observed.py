"""What a real server writes and tells when it is asked to tell more."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.harness import eventually
from tests.process.counting_engine import CRASH
from tests.process.serving import COUNTING, DEMO, Served, run, serving

pytestmark = pytest.mark.process

COMPLETIONS = "/v1/completions"
FIELDS = {"time", "level", "logger", "message"}


def test_a_log_of_json_metrics_of_vllm_and_a_collector_that_is_not_there() -> None:
    options = ("--log-format", "json", "--vllm-metrics", "--otlp-traces-endpoint", "http://127.0.0.1:9")
    with serving(*options, program=COUNTING, OTEL_LOG_LEVEL="error") as server:
        body = {"prompt": [7, 8, 9], "max_tokens": 5}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "r-1"}, timeout=30)
        assert answer.status_code == 200, answer.text
        told = httpx.get(f"{server.url}/metrics").text
        status, _ = server.end()
    assert status == 0
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="demo/target"} 1.0' in told
    lines = [json.loads(line) for line in server.log]
    assert set.intersection(*map(set, lines)) >= FIELDS
    (ended,) = (line for line in lines if line["logger"] == "saccade.requests")
    assert (ended["request_id"], ended["completion_tokens"], ended["finish_reasons"]) == ("r-1", 5, ["length"])


def test_what_the_engines_process_says_is_json_too() -> None:
    """Its log, its last words, and what libraries print."""
    noise = {"PYTHONWARNINGS": "always", "SACCADE_TEST_NOISE": "a library says so"}
    with serving("--log-format", "json", program=COUNTING, **noise) as server:
        body = {"prompt": [CRASH], "max_tokens": 5}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "r-2"}, timeout=30)
        assert answer.status_code == 503
        assert eventually(lambda: any("runs again" in line for line in server.log), seconds=60)
        server.end()
    lines = [json.loads(line) for line in server.log]
    assert set.intersection(*map(set, lines)) >= FIELDS
    assert {line["logger"] for line in lines if line["message"] == "a library says so"} == {"saccade.engine"}
    (words,) = (line for line in lines if line["level"] == "critical")
    assert "RuntimeError: the engine met its crash token" in words["exception"]
    (ended,) = (line for line in lines if line["logger"] == "saccade.requests")
    assert (ended["request_id"], ended["status"], ended["error"]) == ("r-2", 503, "engine_dead")


def test_a_setting_that_cannot_work_is_said_in_json_where_the_log_is() -> None:
    done = run("serve", "nowhere/at-all", "--log-format", "json", "--port", "0")
    assert done.returncode == 1
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "error"
    assert "nowhere/at-all" in last["message"]


def test_metrics_agree_with_what_clients_were_told() -> None:
    """To the token: what answers account for is what the engine counts."""
    with serving(*DEMO, "--no-prefix-caching") as server:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: asked(server, number), range(8)))
        assert eventually(lambda: samples(server)["saccade_running"][()] == 0.0)
        found = samples(server)
    usages = [usage for usage, _ in answers]
    accounts = [usage["speculation"] for usage in usages]

    def told(name: str, *labels: str) -> float:
        return found[name][labels]

    assert told("saccade_requests_finished_total") == told("saccade_time_to_first_token_seconds_count") == 8
    assert told("saccade_generated_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert told("saccade_row_step_tokens_sum") == told("saccade_generated_tokens_total")
    assert told("saccade_row_step_tokens_count") == sum(account["steps"] for account in accounts)
    assert told("saccade_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert told("saccade_accepted_total") == sum(account["accepted"] for account in accounts) > 0
    assert told("saccade_drafted_total") == sum(account["drafted"] for account in accounts)
    assert sum(found["saccade_accepted_at_depth_total"].values()) == told("saccade_accepted_total")
    for drafter in ("draft", "ngram"):
        own = [account["by_drafter"][drafter] for account in accounts]
        assert told("saccade_drafter_drafted_total", drafter) == sum(each["drafted"] for each in own)
        accepted = told("saccade_drafter_accepted_total", drafter)
        assert accepted == sum(each["accepted"] for each in own) > 0
        by_depth = found["saccade_drafter_accepted_at_depth_total"].items()
        assert sum(count for labels, count in by_depth if drafter in labels) == accepted
    assert 0 < told("saccade_queue_seconds_sum") < told("saccade_time_to_first_token_seconds_sum")
    assert told("saccade_engine_process_resident_memory_bytes") > told("process_resident_memory_bytes"), "it has torch"
    parts = sum(told(f"saccade_request_{part}_seconds_sum") for part in ("prefill", "decode"))
    assert parts < told("saccade_e2e_request_latency_seconds_sum")
    waited = sum(seconds for _, seconds in answers)
    assert (
        told("saccade_e2e_request_latency_seconds_sum") < told("saccade_http_request_seconds_sum", COMPLETIONS) < waited
    )


def asked(server: Served, number: int) -> tuple[dict[str, Any], float]:
    """The usage of a request, every other one of which is a stream, and the seconds that it took."""
    prompt = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"
    body = {"prompt": prompt, "max_tokens": 24 + number, "seed": number, "temperature": 0.5, "ignore_eos": True}
    stream = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
    began = time.monotonic()
    answer = httpx.post(server.url + COMPLETIONS, json=body | stream, timeout=60)
    seconds = time.monotonic() - began
    assert answer.status_code == 200, answer.text
    whole = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
    return whole["usage"], seconds


def samples(server: Served) -> dict[str, dict[tuple[str, ...], float]]:
    """Values of /metrics by name and the values of labels, sorted."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.values()))] = sample.value
    return found
