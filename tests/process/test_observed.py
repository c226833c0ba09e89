"""What a real server writes and tells when it is asked to tell more."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.process.serving import COUNTING, serving


@pytest.mark.process
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
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    (ended,) = (line for line in lines if line["logger"] == "saccade.requests")
    assert (ended["request_id"], ended["completion_tokens"], ended["finish_reasons"]) == ("r-1", 5, ["length"])
