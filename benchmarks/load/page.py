"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.load.charts import distributions_chart, ratios_chart, svg, sweep_chart, timeline_chart
from benchmarks.load.comparison import Ratio
from benchmarks.load.results import Result
from benchmarks.load.table import category_rows, figure_rows

_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1080px;margin:32px auto;padding:0 20px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 8px}
.sub{color:#555;margin:0 0 18px}.verdicts{list-style:none;padding:0;margin:0 0 8px}
.verdicts li{padding:9px 14px;margin:6px 0;border-left:5px solid #888;background:#f5f5f5}
.verdicts li.faster{border-color:#009e73}.verdicts li.slower,.verdicts li.failed{border-color:#d55e00}
.note{padding:8px 14px;background:#fff6e0;border-left:5px solid #e69f00;margin:6px 0}
table{border-collapse:collapse;margin:6px 0 16px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 18px 4px 0;border-bottom:1px solid #e2e2e2;vertical-align:top;white-space:pre-wrap}
td+td,th+th{text-align:right}svg{max-width:100%;height:auto}
dt{font-weight:600;margin-top:8px}dd{margin:0 0 0 18px;color:#333}
code{background:#f2f2f2;padding:1px 4px;overflow-wrap:anywhere}
"""
_MEANINGS = {
    "time to first token": "From the moment when the request was to be sent to its first text. In an open loop that "
    "moment is the schedule's, so that time in which the client was held up counts; “from sending” leaves it out.",
    "time per output token": "Time from the first to the last text of an answer, by the tokens that came after the "
    "first chunk. Tokens, not chunks: a speculating server sends several at once.",
    "between chunks": "The pauses that a reader sees, whatever a chunk holds.",
    "end to end": "From the moment when the request was to be sent to the end of its answer.",
    "output tokens/s": "Tokens of successful answers that came within the window, by its length.",
    "in flight": "Requests that were under way, on average over the window: what the load really was.",
    "goodput": "Requests per second that succeeded and met every target.",
    "errors": "Statuses other than 200, error events in mid-stream, streams that ended without [DONE], events that are "
    "no JSON, timeouts, connections that were refused or lost. Failed requests are in no time above.",
    "95% interval": "Of the ratio, from round to round: both servers took turns on the same prompts.",
}


def html_page(result: Result) -> str:
    """The whole page."""
    names = [server.label for server in result.plan.servers]
    title = " and ".join(names) if len(names) > 1 else "Load test"
    return "".join(
        [
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
            f"<meta name='viewport' content='width=device-width'><title>{escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>\n",
            *_body(result, title),
            "</body></html>\n",
        ]
    )


def _body(result: Result, title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1><p class='sub'>{escape(_subtitle(result))}</p>\n"
    yield "<ul class='verdicts'>" + "".join(_verdicts(result)) + "</ul>\n"
    yield from (f"<p class='note'>{escape(note)}</p>\n" for note in result.notes)
    if result.ratios:
        names = [server.label for server in result.plan.servers]
        yield f"<h2>Side by side</h2>\n{svg(ratios_chart(result.ratios, names))}\n"
    if len(result.plan.loads) > 1:
        yield f"<h2>Over the loads</h2>\n{svg(sweep_chart(result))}\n"
    yield f"<h2>Distributions</h2>\n{svg(distributions_chart(result))}\n"
    yield f"<h2>Requests over time</h2>\n{svg(timeline_chart(result))}\n"
    yield "<h2>Figures</h2>\n" + "".join(_tables(result))
    if result.categories:
        heading, *rows = category_rows(result.categories)
        yield (
            "<h2>By category</h2>\n<table>"
            + _row(heading, "th")
            + "".join(_row(row, "td") for row in rows)
            + "</table>\n"
        )
    yield "<h2>What they mean</h2><dl>" + "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(words)}</dd>" for term, words in _MEANINGS.items()
    )
    yield f"</dl>\n<h2>Where from</h2>\n{''.join(_origin(result))}"


def _subtitle(result: Result) -> str:
    extent = result.plan.extent
    amount = f"{extent.requests} requests" if extent.duration is None else f"{extent.duration:g} s"
    rounds = f" in {extent.rounds} rounds" if extent.rounds > 1 else ""
    loads = ", ".join(load.label for load in result.plan.loads)
    goal = f"; goal: {result.goal} ms" if result.goal else ""
    return f"{loads}; {amount} each{rounds}; temperature {result.plan.sampling.temperature:g}{goal}"


def _verdicts(result: Result) -> Iterator[str]:
    for summary in result.summaries:
        if summary.succeeded < summary.requests:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(summary.errors.items()))
            words = (
                f"{summary.server}, {summary.load}: {summary.requests - summary.succeeded} of {summary.requests} failed"
            )
            yield f"<li class='failed'><b>{escape(words)}</b> ({escape(kinds)})</li>"
    if not result.ratios:
        for summary in result.summaries:
            ttft = "" if summary.ttft is None else f", first token after {summary.ttft.p50:.3g} ms (median)"
            yield f"<li><b>{escape(summary.load)}</b>: {summary.output_rate:.4g} output tokens/s{ttft}</li>"
    for ratio in result.ratios:
        yield f"<li class='{_css(ratio)}'>{escape(sentence(ratio, [s.label for s in result.plan.servers]))}</li>"
    if result.texts is not None and result.texts.pairs:
        yield f"<li>Same text for {result.texts.same} of {result.texts.pairs} prompts that both answered.</li>"


def sentence(ratio: Ratio, names: Sequence[str]) -> str:
    """A ratio in words."""
    head = f"{ratio.metric}, {ratio.load}: {names[1]} has {ratio.value:.2f} times what {names[0]} has"
    if ratio.low is None or ratio.high is None:
        return f"{head}; too few rounds to tell how sure that is"
    verdict = ratio.verdict if ratio.verdict == "no difference shown" else f"{names[1]} is {ratio.verdict}"
    return f"{verdict}: {head} (95% interval {ratio.low:.2f} to {ratio.high:.2f})"


def _css(ratio: Ratio) -> str:
    return ratio.verdict if ratio.verdict in ("faster", "slower") else "even"


def _tables(result: Result) -> Iterator[str]:
    for load in result.plan.loads:
        mine = [each for each in result.summaries if each.load == load.label]
        heading = [load.label, *(each.server for each in mine)]
        yield "<table>" + _row(heading, "th") + "".join(_row(row, "td") for row in figure_rows(mine)) + "</table>\n"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _origin(result: Result) -> Iterator[str]:
    yield f"<p><code>{escape(str(result.origin['command']))}</code></p><table>"
    for server in result.measured.servers:
        yield _row([server.label, f"{server.base_url}, model {server.model}"], "td")
    for name, value in result.origin.items():
        if name != "command":
            shown = ", ".join(f"{each:.2f}" for each in value) if name == "load_average" else str(value)
            yield _row([name.replace("_", " "), shown], "td")
    yield "</table>\n"
