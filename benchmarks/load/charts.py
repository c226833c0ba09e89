"""The page's plots, as SVG to be put into HTML."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.figures import COLOURS, new_figure
from benchmarks.load.comparison import Ratio
from benchmarks.load.loops import Turn
from benchmarks.load.results import Result
from benchmarks.load.summary import Summary, times_of

_PANELS = {"ttft": "time to first token", "tpot": "time per output token", "itl": "between chunks"}
_SHOWN = 99  # percentile of times to which a panel reaches, at the least
_MOST_POINTS = 400  # of a curve; more cannot be seen
_STYLES = ("-", "--", ":", "-.")


def svg(figure: Any) -> str:
    """The figure as an element; its texts stay texts."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "saccade"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    whole = out.getvalue()
    return whole[whole.index("<svg") :]


def ratios_chart(ratios: Sequence[Ratio], names: Sequence[str]) -> Any:
    """One line per ratio with its interval; right of 1 is better for the second server, whatever is compared."""
    figure = new_figure(8.6, 0.9 + 0.34 * len(ratios))
    axis = figure.subplots()
    several = len({ratio.load for ratio in ratios}) > 1
    for place, ratio in enumerate(reversed(ratios)):
        turned = 1.0 if ratio.higher_is_better else -1.0
        value, low, high = ((each or ratio.value) ** turned for each in (ratio.value, ratio.low, ratio.high))
        colour = {"faster": COLOURS[1], "slower": COLOURS[3]}.get(ratio.verdict, "#888888")
        axis.plot(sorted((low, high)), [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axis.plot([value], [place], "o", color=colour, markersize=7)
        axis.annotate(f"{value:.2f}×", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.set_yticks(range(len(ratios)), [_ratio_name(each, several) for each in reversed(ratios)], fontsize=9)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_ylim(-0.6, len(ratios) - 0.2)
    _ratio_axis(axis)
    axis.set_xlabel(f"times as fast: {names[1]} over {names[0]}, 95% interval")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _ratio_axis(axis: Any) -> None:
    """Half as fast is as far from 1 as twice as fast."""
    low, high = axis.get_xlim()
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, 0.85 * max(low, axis.dataLim.x0)), max(1.25, high))
    low, high = axis.get_xlim()
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        every = [step * 10.0**power for power in range(-4, 5) for step in steps]
        axis.set_xticks(ticks := [tick for tick in every if low <= tick <= high])
        if len(ticks) > 3:
            break
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.set_xticks([], minor=True)


def _ratio_name(ratio: Ratio, several: bool) -> str:
    return f"{ratio.metric}, {ratio.load}" if several else ratio.metric


def distributions_chart(result: Result) -> Any:
    """Share of times that are at most so long: a panel per kind of time, a line per server and load."""
    figure = new_figure(10.5, 3.4)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (name, title) in zip(axes, _PANELS.items(), strict=True):
        longest = 0.0
        for label, colour, style, turns in _lines(result):
            times = np.sort(times_of(name, [r for turn in turns for r in turn.records if r.error is None]))
            if len(times):
                curve = {"color": colour, "linestyle": style, "label": label, "linewidth": 1.6}
                axis.plot(*_curve(1e3 * times), drawstyle="steps-post", **curve)
                longest = max(longest, 1e3 * float(np.percentile(times, _SHOWN)))
        limit = getattr(result.goal, name, None)
        if limit is not None:
            axis.axvline(limit, color="#888888", linewidth=1, linestyle=":")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("ms")
        axis.set_xlim(0, 1.1 * longest or 1.0)  # one that is far off would press all others to the edge
        _tidy(axis)
    axes[0].set_ylabel("share of all")
    loads = len(result.plan.loads)
    _legend(figure, axes, loads if len(result.plan.servers) > 1 and loads > 1 else None)
    return figure


def _curve(times: Any) -> tuple[Any, Any]:
    shares = np.arange(1, len(times) + 1) / len(times)
    chosen = np.unique(np.linspace(0, len(times) - 1, _MOST_POINTS).astype(int))
    return times[chosen], shares[chosen]


def _lines(result: Result) -> list[tuple[str, str, str, list[Turn]]]:
    """(label, colour, style, turns): a colour per server where there are two, else per load."""
    found = []
    several = len(result.plan.servers) > 1
    for load_place, load in enumerate(result.plan.loads):
        for place, server in enumerate(result.plan.servers):
            turns = [t for t in result.measured.turns if (t.server, t.load.label) == (server.label, load.label)]
            words = [server.label] * several + [load.label] * (len(result.plan.loads) > 1 or not several)
            colour = COLOURS[(0, 3)[place] if several else load_place % len(COLOURS)]
            found.append((", ".join(words), colour, _STYLES[load_place % 4 if several else 0], turns))
    return found


def sweep_chart(result: Result) -> Any:
    """Over the loads of a sweep: throughput, goodput if there is a goal, times to first token and per token."""
    panels = ["output tokens/s", *(["goodput, requests/s"] if result.goal else [])]
    panels += ["time to first token, ms", "time per output token, ms"]
    figure = new_figure(10.5, 3.4)
    axes = figure.subplots(1, len(panels))
    loads = [load.label for load in result.plan.loads]
    for place, server in enumerate(result.plan.servers):
        mine = [each for each in result.summaries if each.server == server.label]
        style = {"color": COLOURS[(0, 3)[place]], "marker": "o", "markersize": 4, "label": server.label}
        axes[0].plot(loads, [each.output_rate for each in mine], **style)
        if result.goal:
            axes[1].plot(loads, [each.good_rate for each in mine], **style)
        for axis, name in ((axes[-2], "ttft"), (axes[-1], "tpot")):
            axis.plot(loads, _percentiles(mine, name, "p50"), **style)
            axis.plot(loads, _percentiles(mine, name, "p99"), **{**style, "linestyle": ":", "label": None})
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=11)
        axis.tick_params(axis="x", rotation=30 if len(loads) > 2 else 0, labelsize=8)
        axis.set_ylim(bottom=0)
        _tidy(axis)
    axes[-2].set_xlabel("solid: median, dotted: p99")
    _legend(figure, axes)
    return figure


def _percentiles(summaries: Sequence[Summary], name: str, which: str) -> list[float]:
    spreads = [getattr(each, name) for each in summaries]
    return [math.nan if spread is None else getattr(spread, which) for spread in spreads]


def timeline_chart(result: Result) -> Any:
    """When each request was to be sent, and how long it took; failures are crosses."""
    figure = new_figure(10.5, 3.0)
    axis = figure.subplots()
    start = min((turn.started for turn in result.measured.turns), default=0.0)
    for place, server in enumerate(result.plan.servers):
        turns = [turn for turn in result.measured.turns if turn.server == server.label]
        records = [record for turn in turns for record in turn.records]
        for failed in (False, True):
            chosen = [record for record in records if (record.error is not None) == failed]
            if chosen:
                times = [record.scheduled - start for record in chosen]
                label = f"{server.label}, failed" if failed else server.label
                marker = {"marker": "x", "s": 26} if failed else {"marker": ".", "s": 22}
                latencies = [record.latency for record in chosen]
                axis.scatter(times, latencies, color=COLOURS[(0, 3)[place]], label=label, alpha=0.8, **marker)
    axis.set_xlabel("seconds from the beginning")
    axis.set_ylabel("end to end, s")
    axis.set_ylim(bottom=0)
    _tidy(axis)
    _legend(figure, [axis])
    return figure


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, axes: Sequence[Any], columns: int | None = None) -> None:
    """
    Args:
        columns: default: as many as there is room for.
    """
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        where = {"loc": "outside lower center", "ncols": columns or min(4, len(found)), "frameon": False, "fontsize": 9}
        figure.legend(found.values(), found.keys(), **where)
