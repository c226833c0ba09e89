"""/metrics: what is counted, under our names and under vLLM's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from decoding.messages import DrafterStats, EngineStats
from server.cli import parse
from server.latencies import Latencies, RequestTimes
from server.observation import Observation
from server.observation_flags import observation
from server.tallies import Tally, add_tally, histogram
from tests.api.harness import SETTINGS, api, fake, saying

VLLM = replace(SETTINGS, observation=Observation(vllm_metrics=True))
STATS = EngineStats(
    running=3,
    pages_total=10,
    pages_free=5,
    pages_cached=1,
    prompt_tokens=100,
    cached_prompt_tokens=40,
    generated_tokens=12,
    drafts=4,
    drafted=20,
    accepted=8,
    by_drafter={"ngram": DrafterStats(20, 8)},
    drafter_seconds={"ngram": 0.5},
    accepted_at=(4, 3, 1),
    row_tokens=(0, 2, 0, 2, 1, *[0] * 60),
    step_sizes=(1, 0, 2, 1, *[0] * 12),
    step_nodes=9,
    steps_by_gear={"full": 4},
    queued=(1, 1, *[0] * 15),
    queued_seconds=0.004,
)


class Reporting:
    """A fake engine with numbers to report."""

    def __init__(self, stats: EngineStats) -> None:
        self._inner = fake(saying("a b", "c d e", "f"))
        self.stats = lambda: stats

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


class Scrape:
    """Values by name and the values of labels, in any order."""

    def __init__(self, text: str) -> None:
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        self._values = {(each.name, *sorted(each.labels.values())): each.value for each in samples}

    def __call__(self, name: str, *labels: str) -> float:
        return self._values[name, *sorted(labels)]


def test_the_engines_report_is_told() -> None:
    with api(Reporting(STATS)) as client:  # type: ignore[arg-type]
        found = Scrape(client.get("/metrics").text)
    assert found("saccade_kv_cache_usage_ratio") == pytest.approx(0.4)
    assert found("saccade_drafter_seconds_total", "ngram") == 0.5
    assert [found("saccade_accepted_at_depth_total", depth) for depth in "123"] == [4, 3, 1]
    assert found("saccade_planned_steps_total", "full") == 4
    assert found("saccade_step_part_seconds_total", "forward") == 0
    assert [found("saccade_row_step_tokens_bucket", le) for le in ("1.0", "2.0", "3.0", "4.0", "+Inf")] == [
        2,
        2,
        4,
        5,
        5,
    ]
    assert (found("saccade_row_step_tokens_count"), found("saccade_row_step_tokens_sum")) == (5, 12)
    assert [found("saccade_step_nodes_bucket", le) for le in ("0.0", "1.0", "3.0", "7.0", "+Inf")] == [1, 1, 3, 4, 4]
    assert (found("saccade_queue_seconds_count"), found("saccade_queue_seconds_sum")) == (2, 0.004)


def test_an_answer_is_measured() -> None:
    with api(saying("a b", "c d e", "f")) as client:
        client.post("/v1/completions", json={"prompt": "x", "n": 2})
        client.post("/v1/completions", json={"prompt": "x y z", "stop": "c"})
        client.post("/v1/completions", json={"prompt": 7})
        found = Scrape(client.get("/metrics").text)
    assert found("saccade_time_to_first_token_seconds_count") == 2
    assert found("saccade_e2e_request_latency_seconds_count") == 2
    assert found("saccade_inter_token_latency_seconds_count") >= 5  # two for each choice; one is cut short
    assert found("saccade_time_per_output_token_seconds_count") == 3
    assert found("saccade_request_prompt_tokens_count") == 2
    assert found("saccade_choices_ended_total", "/v1/completions", "length") == 2
    assert found("saccade_choices_ended_total", "/v1/completions", "stop") == 1


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_an_answer_that_fails_is_counted_as_such(reason: str) -> None:
    with api(saying("a", "b", reason=reason)) as client:
        client.post("/v1/completions", json={"prompt": "x", "stream": True})
        found = Scrape(client.get("/metrics").text)
    assert found("saccade_choices_ended_total", "/v1/completions", "error") == 1


def test_vllms_names_are_there_when_asked_for() -> None:
    with api(Reporting(STATS), VLLM) as client:  # type: ignore[arg-type]
        client.post("/v1/completions", json={"prompt": "x"})
        text = client.get("/metrics").text
    found = Scrape(text)
    label = ("demo", "0")
    assert found("vllm:num_requests_running", *label) == 3
    assert found("vllm:kv_cache_usage_perc", *label) == pytest.approx(0.4)
    assert found("vllm:prompt_tokens_total", *label) == 100
    assert found("vllm:prefix_cache_queries_total", *label) == 100
    assert found("vllm:prefix_cache_hits_total", *label) == 40
    assert found("vllm:spec_decode_num_drafts_total", *label) == 4
    assert found("vllm:spec_decode_num_draft_tokens_total", *label) == 20
    assert found("vllm:spec_decode_num_accepted_tokens_total", *label) == 8
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [found(name, *label, position) for position in "012"] == [4, 3, 1]
    reasons = {name: found("vllm:request_success_total", *label, name) for name in ("stop", "length", "abort", "error")}
    assert reasons == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "time_per_output_token_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
    ):
        assert found(f"vllm:{name}_count", *label) >= 1
    assert found("vllm:request_queue_time_seconds_count", *label) == 2
    with api() as client:
        assert "vllm:" not in client.get("/metrics").text


def test_times_of_a_request() -> None:
    latencies = Latencies()
    times = RequestTimes(latencies, 0.0, 2)
    for choice in (0, 0, 0, 1):
        times.tokens_came(choice)
    times.end(7, [5, 1])
    assert times.first is not None
    assert sum(latencies.first_token.counts) == sum(latencies.end_to_end.counts) == 1
    assert sum(latencies.between_events.counts) == 2
    assert sum(latencies.per_token.counts) == 1  # a single token has no time between tokens
    assert latencies.per_token.total == pytest.approx(latencies.between_events.total / 4)
    assert (latencies.prompt_tokens.total, latencies.output_tokens.total) == (7, 6)


def test_a_tally_is_a_histogram() -> None:
    tally = Tally((1.0, 2.5))
    for value in (0.5, 1.0, 2.0, 3.0):
        tally.observe(value)
    family = histogram("name", "text")
    add_tally(family, [], tally)
    found = {(each.name, *each.labels.values()): each.value for each in family.samples}
    assert found == {
        ("name_bucket", "1.0"): 2,
        ("name_bucket", "2.5"): 3,
        ("name_bucket", "+Inf"): 4,
        ("name_count",): 4,
        ("name_sum",): 6.5,
    }


def test_flags() -> None:
    assert observation(parse(["serve", "model"])) == Observation()
    words = ["--vllm-metrics", "--log-format", "json", "--log-level", "error", "--otlp-traces-endpoint", "http://c:1"]
    assert observation(parse(["serve", "model", *words])) == Observation(True, "json", "error", "http://c:1")
