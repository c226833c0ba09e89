"""What /metrics shows: the engine's counters as they are at the scrape, and the HTTP side's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from decoding.messages import EngineStats

_GAUGES = {
    "running": "Choices in the batch",
    "waiting": "Choices that wait for a place in the batch",
    "pages_total": "Pages of the K/V pool",
    "pages_free": "Pages that hold nothing",
    "pages_cached": "Pages that no request holds, kept for prefix hits",
}
_COUNTERS = {
    "steps": "Forward passes of the target",
    "prompt_tokens": "Prompt tokens of admitted requests",
    "generated_tokens": "Tokens generated",
    "cached_prompt_tokens": "Prompt tokens that came from the prefix cache",
    "preemptions": "Choices preempted to be resumed later",
    "requests_finished": "Choices that ended, for whatever reason",
    "drafted": "Draft tokens verified",
    "accepted": "Draft tokens accepted",
    "step_seconds": "Time in steps",
    "draft_seconds": "Of it, time in drafters",
    "forward_seconds": "Of it, time in the target's forward pass",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """A registry of its own, so that two servers in one process do not share their numbers."""

    def __init__(self, stats: Callable[[], EngineStats], state: Callable[[], str]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, state))
        self._requests = Counter(
            "saccade_http_requests", "Requests answered", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "saccade_http_request_seconds", "Time to the end", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._in_flight = Gauge("saccade_http_requests_in_flight", "Requests being answered", registry=self._registry)
        self._first = Histogram(
            "saccade_time_to_first_token_seconds",
            "From the request's arrival",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def begin_request(self) -> None:
        self._in_flight.inc()

    def end_request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._in_flight.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's latest report when it is asked. A restarted engine's counters begin at 0 again."""

    def __init__(self, stats: Callable[[], EngineStats], state: Callable[[], str]) -> None:
        self._stats = stats
        self._state = state

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("saccade_ready", "1 when requests are served", 1.0 if self._state() == "ready" else 0.0)
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"saccade_{name}", text, float(getattr(stats, name)))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"saccade_{name}", text, float(getattr(stats, name)))
        drafted = CounterMetricFamily(
            "saccade_drafter_drafted", "Draft tokens verified, by drafter", labels=["drafter"]
        )
        accepted = CounterMetricFamily("saccade_drafter_accepted", "Draft tokens accepted", labels=["drafter"])
        for name, each in stats.by_drafter.items():
            drafted.add_metric([name], each.drafted)
            accepted.add_metric([name], each.accepted)
        yield drafted
        yield accepted
