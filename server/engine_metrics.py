"""The engine's numbers as Prometheus families, made of its latest report when they are asked for.

A restarted engine's counters begin at 0 again, as Prometheus expects of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from decoding.messages import EngineStats
from decoding.step_counts import PARTS, QUEUE_SECONDS, size_bounds
from server.engine_client import EngineClient
from server.tallies import add_counts, by_label, histogram, regrouped

ROW_TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)

_GAUGES = {
    "running": "Choices in the batch",
    "waiting": "Choices that wait for a place in the batch",
    "pages_total": "Pages of the K/V pool",
    "pages_free": "Pages that hold nothing",
    "pages_cached": "Pages that no request holds, kept for prefix hits",
}
_COUNTERS = {
    "steps": "Forward passes of the target",
    "prompt_tokens": "Prompt tokens of admitted choices, all of them looked for in the prefix cache",
    "generated_tokens": "Tokens generated",
    "cached_prompt_tokens": "Prompt tokens that came from the prefix cache",
    "preemptions": "Choices preempted to be resumed later",
    "requests_finished": "Choices that ended, for whatever reason",
    "drafts": "Rows of steps that had draft tokens to verify",
    "drafted": "Draft tokens verified",
    "accepted": "Draft tokens accepted",
    "step_seconds": "Time in steps",
    "draft_seconds": "Of it, time in drafters",
    "forward_seconds": "Of it, time in the target's forward pass",
}


class EngineCollector(Collector):
    """Families of the engine's latest report."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        stats, ready = self._client.stats(), self._client.state == "ready"
        yield GaugeMetricFamily("saccade_ready", "1 when requests are served", float(ready))
        yield CounterMetricFamily("saccade_engine_restarts", "Engines started anew", float(self._client.restarts))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"saccade_{name}", text, float(getattr(stats, name)))
        yield GaugeMetricFamily("saccade_kv_cache_usage_ratio", "Share of the K/V pool that choices hold", used(stats))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"saccade_{name}", text, float(getattr(stats, name)))
        yield from _labelled(stats)
        yield from _distributions(stats)


def used(stats: EngineStats) -> float:
    """The share of the K/V pool that choices hold; what is only kept for prefix hits can be had at once."""
    held = stats.pages_total - stats.pages_free - stats.pages_cached
    return held / stats.pages_total if stats.pages_total else 0.0


def _labelled(stats: EngineStats) -> Iterator[Metric]:
    depths = {str(depth): float(count) for depth, count in enumerate(stats.accepted_at, start=1)}
    drafters = stats.by_drafter
    for name, text, label, values in (
        ("drafter_drafted", "Draft tokens verified", "drafter", {d: each.drafted for d, each in drafters.items()}),
        ("drafter_accepted", "Draft tokens accepted", "drafter", {d: each.accepted for d, each in drafters.items()}),
        ("drafter_seconds", "Time of a drafter, also to follow what others draft", "drafter", stats.drafter_seconds),
        ("accepted_at_depth", "Draft tokens accepted, by their depth in the tree", "depth", depths),
        ("planned_steps", "Steps by the planner's gear", "gear", stats.steps_by_gear),
        ("step_part_seconds", "Time of steps by part", "part", by_label(stats.part_seconds, PARTS)),
    ):
        family = CounterMetricFamily(f"saccade_{name}", text, labels=[label])
        for value, count in values.items():
            family.add_metric([value], float(count))
        yield family
    yield _by_drafter_and_depth(stats)


def _by_drafter_and_depth(stats: EngineStats) -> Metric:
    family = CounterMetricFamily(
        "saccade_drafter_accepted_at_depth",
        "Draft tokens accepted of a drafter, by their depth in the tree",
        labels=["drafter", "depth"],
    )
    for drafter, counts in stats.accepted_by.items():
        for depth, count in enumerate(counts, start=1):
            family.add_metric([drafter, str(depth)], float(count))
    return family


def _distributions(stats: EngineStats) -> Iterator[Metric]:
    rows = histogram("saccade_row_step_tokens", "Tokens that a step gave a choice")
    made = float(sum(tokens * count for tokens, count in enumerate(stats.row_tokens)))
    add_counts(rows, [], ROW_TOKENS, regrouped(stats.row_tokens, ROW_TOKENS), made)
    yield rows
    nodes = histogram("saccade_step_nodes", "Draft tokens that the planner had verified in a step")
    add_counts(nodes, [], size_bounds(), stats.step_sizes, float(stats.step_nodes))
    yield nodes
    work = histogram("saccade_step_tokens", "Query tokens of a step: of prompts, roots of trees, draft tokens")
    add_counts(work, [], size_bounds(), stats.step_work, float(stats.step_tokens))
    yield work
    yield queue_times("saccade_queue_seconds", stats)


def queue_times(name: str, stats: EngineStats) -> Metric:
    """How long choices waited for their first place in the batch."""
    family = histogram(name, "Time that a choice waited for its place in the batch")
    add_counts(family, [], QUEUE_SECONDS, stats.queued, stats.queued_seconds)
    return family
