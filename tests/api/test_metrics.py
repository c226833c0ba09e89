"""/metrics: what is counted, under our names and under vLLM's."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from decoding.messages import DrafterStats, EngineStats, TokenEvent
from decoding.request import GenerateRequest
from server.cli import parse
from server.fake_client import Line, Pause
from server.latencies import Latencies, RequestTimes
from server.limits import Limits
from server.observation import Observation
from server.observation_flags import observation
from server.security import Security
from server.tallies import Tally, add_tally, histogram
from tests.api.families import CALL, HERMES, TOOLS, WEATHER
from tests.api.harness import SETTINGS, api, eventually, fake, ids, live, saying

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
    accepted_by={"ngram": (4, 2), "draft": (1, 3, 1)},
    row_tokens=(0, 2, 0, 2, 1, *[0] * 60),
    step_sizes=(1, 0, 2, 1, *[0] * 12),
    step_nodes=9,
    step_work=(0, 1, 0, 2, 1, *[0] * 11),
    step_tokens=25,
    steps_by_gear={"full": 4},
    queued=(1, 1, *[0] * 15),
    queued_seconds=0.004,
)


class Reporting:
    """A fake engine with numbers to report."""

    def __init__(self, stats: EngineStats) -> None:
        self._inner = fake(saying("a b", "c d e", "f"))
        self.stats = lambda: stats
        self.pid = os.getpid()  # some process

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
    assert found("saccade_engine_process_resident_memory_bytes") > 2**20
    assert [found("saccade_accepted_at_depth_total", depth) for depth in "123"] == [4, 3, 1]
    assert [found("saccade_drafter_accepted_at_depth_total", "draft", depth) for depth in "123"] == [1, 3, 1]
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
    assert found("http_requests_total", "/v1/completions", "POST", "2xx") == 1
    assert found("http_request_duration_seconds_count", "/v1/completions") == 1
    assert found("vllm:request_params_max_tokens_sum", *label) == 16
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


def event(choice: int, tokens: int, queued: float = 0.0) -> TokenEvent:
    return TokenEvent("r", choice, tuple(range(tokens)), queued_seconds=queued)


def test_times_of_a_request() -> None:
    latencies = Latencies()
    times = RequestTimes(latencies, time.monotonic() - 2.0, 2)
    times.submitted -= 1.0
    for choice, tokens in ((0, 3), (0, 1), (0, 1), (1, 1)):
        times.tokens_came(choice, event(choice, tokens, queued=0.25))
    times.end(7, 3, [5, 1], wanted=9)
    assert times.scheduled == times.submitted + 0.25
    assert times.first is not None
    assert times.last is not None
    assert sum(latencies.first_token.counts) == sum(latencies.end_to_end.counts) == 1
    assert sum(latencies.between_events.counts) == 2
    assert sum(latencies.per_token.counts) == 1  # a single token has no time between tokens
    assert latencies.per_token.total == pytest.approx(latencies.between_events.total / 2), (
        "two came after the first event"
    )
    assert (latencies.prompt_tokens.total, latencies.computed_tokens.total, latencies.output_tokens.total) == (7, 4, 6)
    assert (latencies.longest_output.total, latencies.wanted_tokens.total, latencies.choices.total) == (5, 9, 2)
    assert latencies.prefill.total == pytest.approx(times.first - times.scheduled)
    assert latencies.prefill.total >= 0.75
    assert latencies.decode.total == pytest.approx(times.last - times.first)
    assert latencies.inference.total == pytest.approx(latencies.prefill.total + latencies.decode.total)


def test_a_request_without_tokens_has_no_times() -> None:
    latencies = Latencies()
    RequestTimes(latencies, time.monotonic(), 1).end(7, 0, [0], wanted=9)
    assert all(not sum(tally.counts) for tally in vars(latencies).values())


def test_the_engines_clock_never_says_that_a_token_came_before_its_place() -> None:
    times = RequestTimes(Latencies(), time.monotonic(), 1)
    times.tokens_came(0, event(0, 1, queued=1000.0))
    assert times.scheduled == times.first


# errors ---------------------------------------------------------------------------------------------------------------


def test_every_refusal_is_counted_with_its_reason() -> None:
    with api(saying("a"), replace(SETTINGS, limits=Limits(max_body_memory=1000))) as client:
        client.post("/v1/completions", json={"prompt": 7})
        client.post("/v1/completions", json={"prompt": "x", "model": "nobody"})
        client.post("/v1/completions", json={"prompt": "x" * 2000})
        client.get("/no/such/path")
        found = Scrape(client.get("/metrics").text)
    errors = "saccade_http_errors_total"
    assert found(errors, "/v1/completions", "invalid_value", "") == 1
    assert found(errors, "/v1/completions", "model_not_found", "") == 1
    assert found(errors, "/v1/completions", "server_overloaded", "max_body_memory") == 1
    assert found(errors, "unknown", "not_found", "") == 1


def test_refusals_of_a_full_server_name_the_limit() -> None:
    def silent(request: GenerateRequest) -> Iterable[Line]:
        yield Pause(30.0)

    engine, limits = fake(silent), Limits(max_queued_requests=1)
    many = {"prompt": ["x", "y", "z"], "max_tokens": 1}
    with live(engine, replace(SETTINGS, rows=1, limits=limits)) as url, ThreadPoolExecutor(1) as pool:
        held = pool.submit(httpx.post, f"{url}/v1/completions", json=many, headers={"x-request-timeout": "1"})
        assert eventually(lambda: len(engine.requests) == 3)
        assert [httpx.post(f"{url}/v1/completions", json=many).status_code for _ in range(3)] == [429] * 3
        assert held.result().status_code == 504
        assert eventually(lambda: "deadline_exceeded" in httpx.get(f"{url}/metrics").text)
        found = Scrape(httpx.get(f"{url}/metrics").text)
    errors = "saccade_http_errors_total"
    assert found(errors, "/v1/completions", "server_overloaded", "max_queued_requests") == 3
    assert found(errors, "/v1/completions", "deadline_exceeded", "") == 1
    assert found("saccade_choices_ended_total", "/v1/completions", "deadline") == 3
    assert found("saccade_http_requests_total", "/v1/completions", "POST", "429") == 3


def test_what_is_turned_away_at_the_door_is_counted_by_its_route() -> None:
    security = Security(api_keys=("sk-right",), metrics_public=True)
    with api(saying("a"), replace(SETTINGS, security=security)) as client:
        for path in ("/v1/completions", "/v1/completions", "/scan/me", "/metrics/x"):
            assert client.post(path, json={"prompt": "x"}).status_code == 401
        found = Scrape(client.get("/metrics").text)
    assert found("saccade_http_errors_total", "/v1/completions", "invalid_api_key", "") == 2
    assert found("saccade_http_errors_total", "unknown", "invalid_api_key", "") == 2


def test_connections_that_are_refused_are_counted() -> None:
    with live(settings=replace(SETTINGS, limits=Limits(max_connections=1))) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as kept:
            kept.sendall(b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            assert httpx.get(f"{url}/health").status_code == 429
            kept.sendall(b"nonsense\r\n\r\n")
            assert b"invalid_http" in b"".join(iter(lambda: kept.recv(1000), b""))
        with httpx.Client(base_url=url) as client:
            assert eventually(lambda: client.get("/health").status_code == 200)
            found = Scrape(client.get("/metrics").text)
    assert found("saccade_http_errors_total", "unknown", "server_overloaded", "max_connections") >= 1
    assert found("saccade_http_errors_total", "unknown", "invalid_http", "") == 1
    assert found("saccade_http_requests_total", "unknown", "other", "400") == 1


def test_an_error_in_mid_stream_is_counted() -> None:
    def late(request: GenerateRequest) -> Iterable[Line]:
        yield replace(event(0, 1), request_id=request.request_id, token_ids=ids("a"))
        yield Pause(30.0)

    with live(late) as url:
        body = {"prompt": "x", "stream": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-timeout": "1"})
        assert answer.status_code == 200
        assert "deadline_exceeded" in answer.text
        assert eventually(lambda: "deadline_exceeded" in httpx.get(f"{url}/metrics").text)
        found = Scrape(httpx.get(f"{url}/metrics").text)
    assert found("saccade_http_errors_total", "/v1/completions", "deadline_exceeded", "") == 1
    assert found("saccade_choices_ended_total", "/v1/completions", "deadline") == 1
    with pytest.raises(KeyError):
        found("saccade_choices_ended_total", "/v1/completions", "cancelled")


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


@pytest.mark.parametrize("form", ["whole", "stream", "responses"])
def test_calls_of_tools_are_a_reason_of_their_own(form: str) -> None:
    said = f"<tool_call>\n{CALL}\n</tool_call>"
    with api(saying(said, reason="stop"), template=HERMES) as client:
        if form == "responses":
            route, tool = "/v1/responses", {"type": "function", **WEATHER["function"]}
            body: dict[str, Any] = {"input": "Weather in Oslo?", "tools": [tool]}
        else:
            route, messages = "/v1/chat/completions", [{"role": "user", "content": "Weather in Oslo?"}]
            body = {"messages": messages, "tools": TOOLS, "stream": form == "stream"}
        assert client.post(route, json=body).status_code == 200
        found = Scrape(client.get("/metrics").text)
    assert found("saccade_choices_ended_total", route, "tool_calls") == 1
    with pytest.raises(KeyError):
        found("saccade_choices_ended_total", route, "stop")
