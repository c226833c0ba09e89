"""What /metrics shows: the engine's counters as they are at the scrape, and the HTTP side's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.account import Account
from server.engine_client import EngineClient
from server.engine_metrics import EngineCollector
from server.latencies import SECONDS, Latencies, RequestTimes
from server.vllm_metrics import Counted, VllmCollector


class Metrics:
    """A registry of its own, so that two servers in one process do not share their numbers.

    Args:
        client: the engine's.
        model: the name that metrics carry.
        vllm: tell the most used ones under vLLM's names as well.
    """

    def __init__(self, client: EngineClient, model: str, *, vllm: bool = False) -> None:
        registry = self._registry = CollectorRegistry()
        self._latencies = Latencies()
        registry.register(EngineCollector(client))
        registry.register(_HttpCollector(self._latencies, model))
        ProcessCollector(registry=registry)
        ProcessCollector("saccade_engine", lambda: client.pid or "none", registry=registry)  # without one, nothing
        self._requests = Counter(
            "saccade_http_requests", "Requests answered", ["route", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            "saccade_http_request_seconds", "Time to the end", ["route"], buckets=SECONDS, registry=registry
        )
        self._in_flight = Gauge("saccade_http_requests_in_flight", "Requests being answered", registry=registry)
        self._errors = Counter(
            "saccade_http_errors",
            "Requests that ended with an error, in mid-stream as well",
            ["route", "code", "limit"],
            registry=registry,
        )
        self._ended = Counter(
            "saccade_choices_ended", "Choices of answers, by why they ended", ["route", "reason"], registry=registry
        )
        if vllm:
            counted = Counted(
                reasons=lambda: [(labels["reason"], value) for labels, value in _values(self._ended)],
                requests=lambda: _values(self._requests),
                seconds=self._seconds,
            )
            registry.register(VllmCollector(client, self._latencies, counted, model))

    def begin_request(self) -> None:
        self._in_flight.inc()

    def end_request(self, account: Account) -> None:
        """Count a request that was begun and has been answered."""
        self._in_flight.dec()
        self.count(account)

    def count(self, account: Account) -> None:
        """Count an answer; of a connection on which no request came to be, too."""
        self._requests.labels(account.route, account.method, str(account.status)).inc()
        self._seconds.labels(account.route).observe(account.seconds)
        if account.error is not None:
            self._errors.labels(account.route, account.error.code, account.error.limit).inc()
        if account.generated is not None:
            account.generated.end()
            for reason in account.finish_reasons:
                self._ended.labels(account.route, reason).inc()

    def times(self, arrived: float, choices: int) -> RequestTimes:
        """The clock of a request that goes to the engine; it arrived at that time (monotonic)."""
        return RequestTimes(self._latencies, arrived, choices)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


def _values(counter: Counter) -> Sequence[tuple[dict[str, str], float]]:
    """Labels and values."""
    samples = [sample for family in counter.collect() for sample in family.samples]
    return [(each.labels, each.value) for each in samples if each.name.endswith("_total")]


class _HttpCollector(Collector):
    """Latencies, and what runs here."""

    def __init__(self, latencies: Latencies, model: str) -> None:
        self._latencies = latencies
        self._build = {"version": version("saccade"), "model_name": model}

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("saccade_build_info", "What runs here; always 1", labels=list(self._build))
        info.add_metric(list(self._build.values()), 1.0)
        yield info
        yield from self._latencies.families()
