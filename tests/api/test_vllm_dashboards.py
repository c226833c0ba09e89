"""vLLM's own dashboards find what they read.

Of its repository, folder examples/observability, at commits 4b5c627 (prometheus_grafana), 5961e8d and 030ea52
(performance, queries), 0b9faa4 (overview, instances), 712d754 (service status), 8aed4e5 (speculative decoding) and
5836216 (K/V cache). What tells of things that there are not here is left out: connectors to other caches, images,
adapters, how long blocks stay in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.api.harness import api
from tests.api.test_metrics import STATS, VLLM, Reporting

GAUGES = """
vllm:num_requests_running
vllm:num_requests_waiting
vllm:num_requests_waiting_by_reason{reason="capacity"}
vllm:num_requests_waiting_by_reason{reason="deferred"}
vllm:kv_cache_usage_perc
vllm:engine_sleep_state{sleep_state="awake"}
process_start_time_seconds
"""
COUNTERS = """
vllm:prompt_tokens_total
vllm:prompt_tokens_cached_total
vllm:prompt_tokens_by_source_total{source="local_compute"}
vllm:prompt_tokens_by_source_total{source="local_cache_hit"}
vllm:prompt_tokens_cached_by_source_total{source="device"}
vllm:generation_tokens_total
vllm:num_preemptions_total
vllm:prefix_cache_queries_total
vllm:prefix_cache_hits_total
vllm:request_success_total{finished_reason="stop"}
vllm:request_success_total{finished_reason="length"}
vllm:request_success_total{finished_reason="abort"}
vllm:request_success_total{finished_reason="error"}
vllm:spec_decode_num_drafts_total
vllm:spec_decode_num_draft_tokens_total
vllm:spec_decode_num_accepted_tokens_total
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}
"""
HISTOGRAMS = """
vllm:time_to_first_token_seconds
vllm:inter_token_latency_seconds
vllm:time_per_output_token_seconds
vllm:request_time_per_output_token_seconds
vllm:e2e_request_latency_seconds
vllm:request_queue_time_seconds
vllm:request_prefill_time_seconds
vllm:request_decode_time_seconds
vllm:request_inference_time_seconds
vllm:request_prompt_tokens
vllm:request_prefill_kv_computed_tokens
vllm:request_generation_tokens
vllm:request_max_num_generation_tokens
vllm:request_params_max_tokens
vllm:request_params_n
vllm:iteration_tokens_total
"""
# they ask for the share of requests within one of these, by the bound's name
TARGETS = {
    "vllm:time_to_first_token_seconds": ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0"),
    "vllm:request_time_per_output_token_seconds": ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5"),
}
HTTP = (
    'http_requests_total{handler="/v1/completions", method="POST", status="2xx"}',
    'http_requests_total{status="4xx"}',
    'http_request_duration_seconds_sum{handler="/v1/completions"}',
    'http_request_duration_seconds_count{handler="/v1/completions"}',
)


@functools.cache
def samples() -> tuple[Sample, ...]:
    """What a server tells that has answered something."""
    with api(Reporting(STATS), VLLM) as client:  # type: ignore[arg-type]
        client.post("/v1/completions", json={"prompt": "x"})
        client.post("/v1/completions", json={"prompt": 3})
        families = text_string_to_metric_families(client.get("/metrics").text)
    return tuple(sample for family in families for sample in family.samples)


def matching(selector: str) -> list[Sample]:
    """The samples of an instant vector; labels are compared for equality only."""
    wanted = promql_parser.parse(selector)
    assert isinstance(wanted, promql_parser.VectorSelector)
    labels = {each.name: each.value for each in wanted.matchers.matchers}
    return [each for each in samples() if each.name == wanted.name and labels.items() <= each.labels.items()]


def selectors() -> Iterator[str]:
    yield from (GAUGES + COUNTERS).split("\n")
    for name in HISTOGRAMS.split():
        yield from (f"{name}_sum", f"{name}_count", f'{name}_bucket{{le="+Inf"}}')
    for name, bounds in TARGETS.items():
        yield from (f'{name}_bucket{{le="{bound}"}}' for bound in bounds)
    yield from HTTP


@pytest.mark.parametrize("selector", [each for each in selectors() if each])
def test_a_series_is_there(selector: str) -> None:
    (found,) = matching(selector) if not selector.startswith("http_requests_total{status") else matching(selector)[:1]
    if found.name.startswith("vllm:"):
        assert (found.labels["model_name"], found.labels["engine"]) == ("demo", "0")


def test_a_server_that_is_not_ready_is_down_and_not_asleep() -> None:
    engine = Reporting(STATS)
    engine._inner.die()
    with api(engine, VLLM) as client:  # type: ignore[arg-type]
        assert "engine_sleep_state{" not in client.get("/metrics").text
