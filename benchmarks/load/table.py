"""Figures as rows of text: for terminals, and for the tables of the page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load.results import Result
from benchmarks.load.summary import Category, Speculation, Spread, Summary

TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between chunks",
    "e2el": "end to end",
}


def text_table(result: Result) -> str:
    """All of it, for a terminal."""
    parts = []
    for load in result.plan.loads:
        mine = [each for each in result.summaries if each.load == load.label]
        parts.append(_block([[f"load: {load.label}", *(each.server for each in mine)], *figure_rows(mine)]))
        ratios = [ratio for ratio in result.ratios if ratio.load == load.label]
        if ratios:
            names = [server.label for server in result.plan.servers]
            heading = [f"{names[1]} / {names[0]}", "ratio [95% interval]", names[1] + " is"]
            parts.append(_block([heading, *([each.metric, str(each), each.verdict] for each in ratios)]))
    if result.texts is not None and result.texts.pairs:
        parts.append(f"same text: {result.texts.same} of {result.texts.pairs} prompts that both answered")
    if result.categories:
        parts.append(_block(category_rows(result.categories)))
    parts += [f"note: {note}" for note in result.notes]
    return "\n\n".join(parts)


def figure_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """A row per figure, a cell per summary."""
    rows = [
        ["requests (succeeded)", *(f"{each.requests} ({each.succeeded})" for each in summaries)],
        ["errors", *(_errors(each) for each in summaries)],
        ["requests/s", *(f"{each.request_rate:.3g}" for each in summaries)],
        ["in flight, on average", *(f"{each.in_flight:.3g}" for each in summaries)],
        ["output tokens/s", *(f"{each.output_rate:.4g}" for each in summaries)],
    ]
    if any(each.good_rate is not None for each in summaries):
        rows.append(["goodput, requests/s (share)", *(_good(each) for each in summaries)])
    for name, words in TIMES.items():
        spreads = [getattr(each, name) for each in summaries]
        rows.append([f"{words}, ms: p50 / p90 / p99", *(_spread(spread) for spread in spreads)])
    rows.append(["first token from sending, ms", *(_spread(each.ttft_sent) for each in summaries)])
    if any(each.failed for each in summaries):
        rows.append(["failed requests, ms from sending", *(_spread(each.failed) for each in summaries)])
    rows.append(["tokens per chunk", *(_number(each.tokens_per_chunk) for each in summaries)])
    if any(each.speculation for each in summaries):
        rows.append(["drafted tokens accepted", *(_accepted(each.speculation) for each in summaries)])
        names = sorted({name for each in summaries if each.speculation for name in each.speculation.by_drafter})
        rows += [[f"  of {name}", *(_of_drafter(each.speculation, name) for each in summaries)] for name in names]
        rows.append(["tokens per step", *(_per_step(each.speculation) for each in summaries)])
    rows.append(["tokens counted by", *(each.source for each in summaries)])
    rows.append(["client: sent late p99, loop late p99, busy", *(_client(each) for each in summaries)])
    return rows


def category_rows(categories: Sequence[Category]) -> list[list[str]]:
    """A heading, and a row per category and server."""
    rows = [["category", "server", "requests", "TTFT p50, ms", "TPOT p50, ms", "drafts accepted", "tokens per step"]]
    for each in sorted(categories, key=lambda each: each.category):
        times = ("-" if spread is None else f"{spread.p50:.4g}" for spread in (each.ttft, each.tpot))
        told = (_accepted(each.speculation), _per_step(each.speculation))
        rows.append([each.category, each.server, str(each.requests), *times, *told])
    return rows


def _block(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _errors(summary: Summary) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(summary.errors.items())) or "none"


def _good(summary: Summary) -> str:
    return "-" if summary.good_rate is None else f"{summary.good_rate:.3g} ({summary.good_share:.0%})"


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50:.4g} / {spread.p90:.4g} / {spread.p99:.4g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _accepted(speculation: Speculation | None) -> str:
    if speculation is None or speculation.acceptance is None:
        return "-"
    return f"{speculation.accepted} of {speculation.drafted} ({speculation.acceptance:.0%})"


def _of_drafter(speculation: Speculation | None, name: str) -> str:
    drafted, accepted = (0, 0) if speculation is None else speculation.by_drafter.get(name, (0, 0))
    return f"{accepted} of {drafted} ({accepted / drafted:.0%})" if drafted else "-"


def _per_step(speculation: Speculation | None) -> str:
    return "-" if speculation is None else _number(speculation.tokens_per_step)


def _client(summary: Summary) -> str:
    late = 0.0 if summary.late is None else summary.late.p99
    return f"{late:.1f} ms, {summary.lag_p99_ms:.1f} ms, {summary.client_cpu:.0%}"
