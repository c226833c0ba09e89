"""Histograms that cost a bisection an observation; a family of Prometheus is made of them when it is asked for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily


class Tally:
    """Counts of values between bounds, and their sum.

    ``prometheus_client.Histogram.observe`` walks through its buckets and takes a lock: ten times the cost, which counts
    where every event of every stream is observed.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def histogram(name: str, text: str, labels: Sequence[str] = ()) -> HistogramMetricFamily:
    """An empty family."""
    return HistogramMetricFamily(name, text, labels=labels)


def add_tally(family: HistogramMetricFamily, labels: Sequence[str], tally: Tally) -> None:
    """The tally as a member of the family."""
    add_counts(family, labels, tally.bounds, tally.counts, tally.total)


def add_counts(
    family: HistogramMetricFamily,
    labels: Sequence[str],
    bounds: Sequence[float],
    counts: Sequence[int],
    total: float,
) -> None:
    """Counts as a member of the family.

    Args:
        counts: of values up to each bound and above the one before; the last of what is above all.
    """
    below, buckets = 0, []
    for bound, count in zip([*map(float, bounds), float("inf")], counts or [0] * (len(bounds) + 1), strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
    family.add_metric(list(labels), buckets, total)


def regrouped(counts: Sequence[int], bounds: Sequence[int]) -> list[int]:
    """Counts by value as counts between bounds, the last of what is above all of them."""
    grouped = [0] * (len(bounds) + 1)
    for value, count in enumerate(counts):
        grouped[bisect_left(bounds, value)] += count
    return grouped


def by_label(found: Mapping[str, float], expected: Sequence[str]) -> dict[str, float]:
    """What was found, and 0 for what is expected: a series that is not there yet cannot show its first increase."""
    return dict.fromkeys(expected, 0.0) | dict(found)
