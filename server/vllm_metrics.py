"""Our numbers under vLLM's names (those of its v1 engine), for dashboards and clients that were made for it.

Buckets are ours: quantiles come out as finely, but not on vLLM's bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from decoding.messages import EngineStats
from decoding.step_counts import QUEUE_SECONDS, size_bounds
from server.engine_client import EngineClient
from server.engine_metrics import used
from server.latencies import Latencies
from server.tallies import Tally, add_counts, add_tally, histogram

# ours: vLLM's
_REASONS = {
    "stop": "stop",
    "tool_calls": "stop",
    "length": "length",
    "cancelled": "abort",
    "deadline": "abort",
    "error": "error",
}
_LABELS = ("model_name", "engine")
_ABOUT = "See the metric of saccade of about that name"


@dataclass(frozen=True)
class Counted:
    """What the HTTP side counts.

    Attributes:
        reasons: choices that ended, by reason (several entries of one reason add up).
        requests: answers, by route, method and status.
        seconds: of answers, by route.
    """

    reasons: Callable[[], Sequence[tuple[str, float]]]
    requests: Callable[[], Sequence[tuple[dict[str, str], float]]]
    seconds: Histogram


class VllmCollector(Collector):
    """The families of vLLM that mean something here."""

    def __init__(self, client: EngineClient, latencies: Latencies, counted: Counted, model: str) -> None:
        self._client = client
        self._latencies = latencies
        self._counted = counted
        self._values = [model, "0"]

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats()
        yield self._gauge("num_requests_running", "Choices in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "Choices that wait", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the K/V pool in use; 1 is all of it", used(stats))
        for name, text, value in (
            ("num_preemptions", "Preemptions", stats.preemptions),
            ("prompt_tokens", "Prompt tokens", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens from the prefix cache", stats.cached_prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.generated_tokens),
            ("prefix_cache_queries", "Tokens looked for in the prefix cache", stats.prompt_tokens),
            ("prefix_cache_hits", "Tokens found there", stats.cached_prompt_tokens),
            ("spec_decode_num_drafts", "Rows of steps with draft tokens", stats.drafts),
            ("spec_decode_num_draft_tokens", "Draft tokens verified", stats.drafted),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted", stats.accepted),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            family.add_metric(self._values, float(value))
            yield family
        if self._client.state == "ready":  # else it is neither awake nor asleep, but down
            yield self._labelled_gauge("engine_sleep_state", "Whether it serves", "sleep_state", {"awake": 1.0})
        waiting = {"capacity": float(stats.waiting), "deferred": 0.0}
        yield self._labelled_gauge("num_requests_waiting_by_reason", "Choices that wait", "reason", waiting)
        yield from self._by_source(stats)
        yield self._by_position(stats)
        yield self._by_reason()
        yield from self._histograms(stats)
        yield self._http_requests()
        yield self._http_seconds()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._values, float(value))
        return family

    def _labelled_gauge(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=[*_LABELS, label])
        for value, number in values.items():
            family.add_metric([*self._values, value], number)
        return family

    def _by_source(self, stats: EngineStats) -> Iterator[Metric]:
        name, text, labels = "vllm:prompt_tokens", "Prompt tokens, by where their K/V came from", [*_LABELS, "source"]
        cached = float(stats.cached_prompt_tokens)
        family = CounterMetricFamily(f"{name}_by_source", text, labels=labels)
        family.add_metric([*self._values, "local_compute"], stats.prompt_tokens - cached)
        family.add_metric([*self._values, "local_cache_hit"], cached)
        yield family
        family = CounterMetricFamily(f"{name}_cached_by_source", "Cached prompt tokens, by where", labels=labels)
        family.add_metric([*self._values, "device"], cached)
        yield family

    def _by_position(self, stats: EngineStats) -> Metric:
        """vLLM counts positions from 0; a tree's nodes of one depth are one position."""
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by position"
        family = CounterMetricFamily(name, text, labels=[*_LABELS, "position"])
        for position, count in enumerate(stats.accepted_at):
            family.add_metric([*self._values, str(position)], float(count))
        return family

    def _by_reason(self) -> Metric:
        counts = dict.fromkeys(_REASONS.values(), 0.0)
        for reason, value in self._counted.reasons():
            counts[_REASONS[reason]] += value
        family = CounterMetricFamily(
            "vllm:request_success", "Choices that ended, by reason", labels=[*_LABELS, "finished_reason"]
        )
        for reason, value in counts.items():
            family.add_metric([*self._values, reason], value)
        return family

    def _histograms(self, stats: EngineStats) -> Iterator[Metric]:
        found = self._latencies
        for name, tally in (
            ("time_to_first_token_seconds", found.first_token),
            ("inter_token_latency_seconds", found.between_events),
            ("time_per_output_token_seconds", found.between_events),  # its older name
            ("request_time_per_output_token_seconds", found.per_token),
            ("e2e_request_latency_seconds", found.end_to_end),
            ("request_prefill_time_seconds", found.prefill),
            ("request_decode_time_seconds", found.decode),
            ("request_inference_time_seconds", found.inference),
            ("request_prompt_tokens", found.prompt_tokens),
            ("request_prefill_kv_computed_tokens", found.computed_tokens),
            ("request_generation_tokens", found.output_tokens),
            ("request_max_num_generation_tokens", found.longest_output),
            ("request_params_max_tokens", found.wanted_tokens),
            ("request_params_n", found.choices),
        ):
            yield self._histogram(name, tally)
        queue = histogram("vllm:request_queue_time_seconds", "Time in the queue", _LABELS)
        add_counts(queue, self._values, QUEUE_SECONDS, stats.queued, stats.queued_seconds)
        yield queue
        work = histogram("vllm:iteration_tokens_total", "Query tokens of a step", _LABELS)
        add_counts(work, self._values, size_bounds(), stats.step_work, float(stats.step_tokens))
        yield work

    def _histogram(self, name: str, tally: Tally) -> HistogramMetricFamily:
        family = histogram(f"vllm:{name}", _ABOUT, _LABELS)
        add_tally(family, self._values, tally)
        return family

    def _http_requests(self) -> Metric:
        """As the library counts that vLLM has for it: by the first digit of the status."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for labels, value in self._counted.requests():
            counts[labels["route"], labels["method"], f"{labels['status'][0]}xx"] += int(value)
        family = CounterMetricFamily("http_requests", "Requests answered", labels=["handler", "method", "status"])
        for handler, count in counts.items():
            family.add_metric(handler, float(count))
        return family

    def _http_seconds(self) -> Metric:
        name = "http_request_duration_seconds"
        family = HistogramMetricFamily(name, "Time to the end")
        for ours in self._counted.seconds.collect():
            for sample in ours.samples:
                if sample.name.endswith(("_bucket", "_count", "_sum")):
                    labels = {"handler" if label == "route" else label: value for label, value in sample.labels.items()}
                    family.add_sample(name + sample.name.removeprefix(ours.name), labels, sample.value)
        return family
