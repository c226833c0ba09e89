"""The page of metrics and the dashboard speak of what there is."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.app import build_app
from server.tracing import attributes
from tests.api.harness import SETTINGS, api, fake, saying, tokenizer
from tests.api.test_metrics import STATS, VLLM, Reporting

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "saccade.json").read_text(encoding="utf-8"))
PROCESS = ("process_", "saccade_engine_process_")  # what its official clients tell of processes
FROM_PROMETHEUS = {"job", "instance", "le"}  # labels that it adds, and that of buckets


@functools.cache
def families() -> dict[str, Metric]:
    """What a server tells that has done something, and refused something, by the name in the page."""
    with api(Reporting(STATS), VLLM) as client:  # type: ignore[arg-type]
        client.post("/v1/completions", json={"prompt": "x"})
        client.post("/v1/completions", json={"prompt": 7})
        found = list(text_string_to_metric_families(client.get("/metrics").text))
    kept = [each for each in found if not each.name.endswith("_created")]
    return {each.name + ("_total" if each.type == "counter" else ""): each for each in kept}


@functools.cache
def series() -> dict[str, set[str]]:
    """The names of samples, with their labels."""
    found: dict[str, set[str]] = {}
    for family in families().values():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def panels() -> Iterator[tuple[str, str]]:
    """Titles and queries."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def parsed(expression: str) -> Any:
    """A query as Prometheus would get it."""
    filled = expression.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")
    assert "$" not in filled, "an unknown variable"
    return promql_parser.parse(filled)


def selectors(node: Any) -> Iterator[Any]:
    """The series that a query reads."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for child in [*children, *getattr(node, "args", ())]:
        if child is not None and type(child).__module__ == type(node).__module__:
            yield from selectors(child)


def grouped(node: Any) -> Iterator[tuple[Any, list[str]]]:
    """Aggregations by labels, and the labels."""
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        yield node, list(node.modifier.labels)
    for name in ("expr", "lhs", "rhs"):
        if (child := getattr(node, name, None)) is not None:
            yield from grouped(child)
    for child in getattr(node, "args", ()):
        yield from grouped(child)


@pytest.mark.parametrize(("title", "expression"), list(panels()))
def test_a_panel_shows_metrics_that_there_are(title: str, expression: str) -> None:
    query = parsed(expression)
    read = list(selectors(query))
    assert read, title
    for each in read:
        assert each.name in series(), f"{title}: {each.name}"
    for node, labels in grouped(query):
        for each in selectors(node):
            assert set(labels) <= series()[each.name] | FROM_PROMETHEUS, f"{title}: {labels} of {each.name}"


def test_the_test_would_notice() -> None:
    assert [each.name for each in selectors(parsed("sum (rate(a[1m])) / sum (b{x='y'})"))] == ["a", "b"]
    assert [labels for _, labels in grouped(parsed("f_x / sum by (c) (rate(a[1m]))"))] == [["c"]]
    with pytest.raises(ValueError, match="parenthesis"):
        parsed("sum (rate(a[1m])")


def test_the_dashboard_shows_everything_of_weight() -> None:
    shown = {each.name for _, expression in panels() for each in selectors(parsed(expression))}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {name for name in families() if name.startswith("saccade_") and not name.startswith(PROCESS)}
    elsewhere = {  # told in another form by a panel, or of no use over time
        "saccade_build_info",
        "saccade_http_request_seconds",
        "saccade_requests_finished_total",
        "saccade_pages_free",
        "saccade_step_seconds_total",
        "saccade_draft_seconds_total",
        "saccade_forward_seconds_total",
    }
    assert ours - bases == elsewhere


def test_panels_do_not_lie_on_each_other() -> None:
    cells = [
        (column, line)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_the_page_has_every_metric() -> None:
    rows = re.findall(r"^\| `((?:saccade_|vllm:|http_)\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    told = {name: [part.strip() for part in rest.split("|")] for name, rest in rows}
    there = {name: family for name, family in families().items() if not name.startswith(PROCESS)}
    assert set(told) == set(there)
    assert len(rows) == len(told), "one row each"
    for name, family in there.items():
        if name.startswith("saccade_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            wanted = [family.type, ", ".join(f"`{label}`" for label in labels), family.documentation]
            assert told[name] == wanted, name


def test_the_page_names_attributes_that_spans_have() -> None:
    found: dict[str, Any] = {}

    class Keeping:
        def trace(self, account: Any, scope: Any) -> None:
            found.update(attributes(account, scope))

    asked = {"prompt": "x", "temperature": 0.5, "top_p": 0.5, "top_k": 3, "presence_penalty": 1, "frequency_penalty": 1}
    for reason in ("length", "error"):  # only what fails has the one's error, only what ends well the other's account
        app = build_app(fake(saying("a", "b", reason=reason)), tokenizer(), SETTINGS, tracer=Keeping())  # type: ignore[arg-type]
        TestClient(app).post("/v1/completions", json=asked)
    named = set(re.findall(r"`((?:http|gen_ai|saccade|error|server)\.[a-z0-9_.]+)`", PAGE))
    assert set(found) == named
