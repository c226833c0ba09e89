"""The plots of an acceptance report, as PNG files. Needs matplotlib, which serving does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceptance_runs import RANKS, REPLAY, Measured, Oracle, Variant
from benchmarks.figures import COLOURS, DPI, new_figure
from benchmarks.rates import Estimate, by_depth, tokens_per_step

PANELS = 4  # in a row, at most


def draw(folder: Path, measured: Sequence[Measured], oracles: Sequence[Oracle]) -> list[Path]:
    """All plots; returns their files."""
    files = [folder / "acceptance-by-depth.png", folder / "tokens-per-step.png"]
    _save(files[0], _depths(measured))
    _save(files[1], _bars(measured))
    if oracles:
        files.append(folder / "oracle.png")
        _save(files[2], _oracle(oracles))
    return files


def _save(path: Path, figure: Any) -> None:
    figure.savefig(path, dpi=DPI)


def _panels(titles: Sequence[str], columns: int, ylabel: str) -> tuple[Any, list[Any]]:
    rows = math.ceil(len(titles) / columns)
    figure = new_figure(0.8 + 3.6 * columns, 0.9 + 2.9 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(titles) :]:
        axis.set_visible(False)
    for axis in axes[: len(titles) : columns]:
        axis.set_ylabel(ylabel)
    for axis in axes[max(0, len(titles) - columns) : len(titles)]:
        axis.set_xlabel("depth")
        axis.tick_params(labelbottom=True)
    return figure, axes[: len(titles)]


def _depths(measured: Sequence[Measured]) -> Any:
    """A panel per set of drafters; a line per text."""
    names = list(dict.fromkeys(m.drafters for m in measured))
    figure, axes = _panels(names, min(PANELS, len(names)), "P(at least so many accepted)")
    lines = _lines(measured)
    deepest = max(_reach(by_depth(m.counts)) for m in measured)
    for axis, name in zip(axes, names, strict=True):
        for text, (colour, style) in lines.items():
            found = [m for m in measured if m.drafters == name and m.text == text]
            rates = by_depth(found[0].counts) if found else []
            reach = _reach(rates)
            if reach:
                _line(axis, rates[:reach], color=colour, linestyle=style, label=text)
        axis.set_ylim(0, 1)
        axis.set_xlim(0.8, max(deepest, 1) + 0.2)
        axis.set_xticks(range(1, deepest + 1))
    _legend(figure, axes[0], len(lines))
    return figure


def _lines(measured: Sequence[Measured]) -> dict[str, tuple[str, str]]:
    """Colour and style of each text: a colour per temperature, dashed when not coupled; real text is black."""
    temperatures = sorted({m.variant.temperature for m in measured if m.text != REPLAY})
    lines = {}
    for colour, t in zip(COLOURS * len(temperatures), temperatures):
        lines[Variant(t).label] = (colour, "-")
        if t == temperatures[-1] and t > 0:
            lines[Variant(t, coupled=False).label] = (colour, "--")
    lines[REPLAY] = (COLOURS[-1], ":")
    return lines


def _line(axis: Any, rates: Sequence[Estimate], **style: Any) -> None:
    depths = range(1, len(rates) + 1)
    values, errors = [e.value for e in rates], [e.error or 0.0 for e in rates]
    axis.errorbar(depths, values, yerr=errors, marker="o", markersize=3.5, linewidth=1.6, capsize=2, **style)


def _legend(figure: Any, axis: Any, entries: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(entries, 6), frameon=False)


def _reach(rates: Sequence[Estimate]) -> int:
    return sum(1 for rate in rates if rate.value > 0)


def _bars(measured: Sequence[Measured]) -> Any:
    """A group per set of drafters, a bar per text; a line across the bar is what uncoupled drafts make."""
    names = list(dict.fromkeys(m.drafters for m in measured))
    texts = list(dict.fromkeys(m.text for m in measured if m.variant == Variant(m.variant.temperature)))
    figure = new_figure(max(6.0, 1.6 + 1.7 * len(names)), 4.2)
    axis = figure.subplots()
    wide = 0.8 / len(texts)
    colours = [_lines(measured)[text][0] for text in texts]
    crossed = False
    label_style = {"ha": "center", "va": "bottom", "fontsize": 8, "weight": "bold", "color": "white", "rotation": 90}
    for place, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        for group, name in enumerate(names):
            at = group + (place - (len(texts) - 1) / 2) * wide
            found = _rate(measured, name, text)
            if found is None:
                continue
            label = text if group == 0 else None
            bar = {"color": colour, "alpha": 0.85, "label": label, "capsize": 2}
            axis.bar(at, found.value, 0.92 * wide, yerr=found.error or 0.0, **bar)
            axis.text(at, 0.06, f"{found.value:.2f}", **label_style)
            plain = _rate(measured, name, f"{text} uncoupled")
            if plain is not None:
                label = None if crossed else "uncoupled"
                axis.hlines(plain.value, at - 0.46 * wide, at + 0.46 * wide, color="black", linewidth=2, label=label)
                crossed = True
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), [name.replace("+", "\n+ ") for name in names])
    axis.set_ylabel("tokens per step")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, axis, len(texts) + 1)
    return figure


def _rate(measured: Sequence[Measured], name: str, text: str) -> Estimate | None:
    found = [m for m in measured if m.drafters == name and m.text == text]
    return tokens_per_step(found[0].counts) if found else None


def _oracle(oracles: Sequence[Oracle]) -> Any:
    """A row per drafter, a panel per text, a line per k."""
    columns = len(oracles) // len({o.drafter for o in oracles})
    figure, axes = _panels([f"{o.drafter}, {o.text}" for o in oracles], columns, "right token among the k best")
    deepest = max(len(o.top[1]) for o in oracles)
    for axis, oracle in zip(axes, oracles, strict=True):
        for k, colour in zip(RANKS, COLOURS):
            shares = oracle.top[k]
            axis.plot(range(1, len(shares) + 1), shares, "o-", markersize=3.5, color=colour, label=f"k = {k}")
        axis.set_ylim(0, 1)
        axis.set_xlim(0.8, deepest + 0.2)
        axis.set_xticks(range(1, deepest + 1))
    _legend(figure, axes[0], len(RANKS))
    return figure
