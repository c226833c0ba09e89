"""Our numbers under vLLM's names (those of its v1 engine), for dashboards and clients that were made for it.

Buckets are ours: quantiles come out as finely, but not on vLLM's bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from decoding.messages import EngineStats
from decoding.step_counts import QUEUE_SECONDS
from server.engine_metrics import used
from server.latencies import Latencies
from server.tallies import Tally, add_counts, add_tally, histogram

_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}  # ours: vLLM's
_LABELS = ("model_name", "engine")


class VllmCollector(Collector):
    """The families of vLLM that mean something here.

    Args:
        reasons: choices that ended, by reason (several entries of one reason add up).
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        latencies: Latencies,
        reasons: Callable[[], Sequence[tuple[str, float]]],
        model: str,
    ) -> None:
        self._stats = stats
        self._latencies = latencies
        self._reasons = reasons
        self._values = [model, "0"]

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._gauge("num_requests_running", "Choices in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "Choices that wait", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the K/V pool in use; 1 is all of it", used(stats))
        for name, text, value in (
            ("num_preemptions", "Preemptions", stats.preemptions),
            ("prompt_tokens", "Prompt tokens", stats.prompt_tokens),
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
        yield self._by_position(stats)
        yield self._by_reason()
        yield from self._histograms(stats)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._values, float(value))
        return family

    def _by_position(self, stats: EngineStats) -> Metric:
        """vLLM counts positions from 0; a tree's nodes of one depth are one position."""
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by position"
        family = CounterMetricFamily(name, text, labels=[*_LABELS, "position"])
        for position, count in enumerate(stats.accepted_at):
            family.add_metric([*self._values, str(position)], float(count))
        return family

    def _by_reason(self) -> Metric:
        counts = dict.fromkeys(_REASONS, 0.0)
        for reason, value in self._reasons():
            counts[reason] += value
        family = CounterMetricFamily(
            "vllm:request_success", "Choices that ended, by reason", labels=[*_LABELS, "finished_reason"]
        )
        for reason, value in counts.items():
            family.add_metric([*self._values, _REASONS[reason]], value)
        return family

    def _histograms(self, stats: EngineStats) -> Iterator[Metric]:
        found = self._latencies
        for name, tally in (
            ("time_to_first_token_seconds", found.first_token),
            ("inter_token_latency_seconds", found.between_events),
            ("time_per_output_token_seconds", found.between_events),  # its older name
            ("request_time_per_output_token_seconds", found.per_token),
            ("e2e_request_latency_seconds", found.end_to_end),
            ("request_prompt_tokens", found.prompt_tokens),
            ("request_generation_tokens", found.output_tokens),
        ):
            yield self._histogram(name, tally)
        queue = histogram("vllm:request_queue_time_seconds", "Time in the queue", _LABELS)
        add_counts(queue, self._values, QUEUE_SECONDS, stats.queued, stats.queued_seconds)
        yield queue

    def _histogram(self, name: str, tally: Tally) -> HistogramMetricFamily:
        family = histogram(f"vllm:{name}", "See the metric of saccade of about that name", _LABELS)
        add_tally(family, self._values, tally)
        return family
