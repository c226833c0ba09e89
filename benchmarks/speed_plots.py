"""The plots of docs/benchmarks.md, as PNG files. Needs matplotlib, which serving does not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, never_slower, rates, systems
from benchmarks.checks import MEAN_RATIO, WORST_RATIO
from benchmarks.figures import COLOURS, DPI, new_figure
from benchmarks.measure import summarise
from benchmarks.offline_tables import TREES, over_one
from benchmarks.peer_tables import ORDER, OURS, runs_of
from benchmarks.roofline import Roofline
from benchmarks.settings import SETTINGS

Piece = dict[str, Any]
ROOF = "limit of plain decoding"


def draw_matrix(folder: Path, cells: Sequence[Cell], roofs: Mapping[str, tuple[Roofline, int]]) -> list[Path]:
    """Tokens per second over concurrency for each family, and the ratios of all of them.

    Args:
        roofs: family -> what its machine allows, and the context that it is computed for.
    """
    files = []
    for family in sorted({cell.family for cell in cells}):
        mine = [cell for cell in cells if cell.family == family]
        files.append(_save(folder / f"speed-{family}.png", _rates(mine, roofs.get(family))))
    return [*files, _save(folder / "never-slower.png", _ratios(cells))]


def draw_forward(folder: Path, pieces: Sequence[Piece]) -> Path:
    """The forward pass over query tokens, in forward passes of one token."""
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    for piece, colour in zip(pieces, COLOURS):
        sizes = sorted(int(size) for size in piece["times"])
        spreads = [spread for size in sizes if (spread := over_one(piece, size)) is not None]
        axis.plot(sizes, [spread.median for spread in spreads], "o-", color=colour, markersize=4, label=piece["family"])
        axis.fill_between(sizes, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.15)
    axis.plot(list(TREES), list(TREES.values()), "kv", label="required: at most")
    axis.set_xlabel("query tokens of one row")
    axis.set_ylabel("time, in forward passes of one token")
    axis.set_ylim(bottom=0)
    _finish(axis)
    axis.legend(frameon=False)
    return _save(folder / "forward-cost.png", figure)


def draw_peers(folder: Path, pieces: Sequence[Piece]) -> Path:
    """Tokens per second of one request, ours and others', a panel for each piece."""
    figure = new_figure(0.8 + 4.4 * len(pieces), 4.0)
    axes = figure.subplots(1, len(pieces), squeeze=False)[0]
    for axis, piece in zip(axes, pieces, strict=True):
        runs = runs_of(piece)
        names = [name for name in reversed(ORDER) if name in runs]
        speeds = [summarise(runs[name], [], comparable_text=False).tokens_per_second for name in names]
        bars = axis.barh(names, speeds, color=[COLOURS[0] if name in OURS else "#999999" for name in names])
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
        axis.set_title(f"{piece['family']}, T={piece['temperature']:g}, {piece['concurrency']} at once", fontsize=11)
        axis.set_xlabel("tokens/s")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(folder / "peers.png", figure)


def _rates(cells: Sequence[Cell], roof: tuple[Roofline, int] | None) -> Any:
    """A panel per temperature, a line per system."""
    temperatures = sorted({cell.temperature for cell in cells})
    figure = new_figure(0.8 + 4.6 * len(temperatures), 4.2)
    axes = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for axis, temperature in zip(axes, temperatures, strict=True):
        mine = sorted((c for c in cells if c.temperature == temperature), key=lambda cell: cell.concurrency)
        for name, colour in zip(SETTINGS, ("#000000", *COLOURS[1:4], COLOURS[0])):
            points = [(c.concurrency, statistics.median(rates(c, name))) for c in mine if name in systems(c)]
            if points:
                axis.plot(*zip(*points), "o-", color=colour, markersize=4, label=name)
        if roof is not None:
            line, context = roof
            at = [cell.concurrency for cell in mine]
            axis.plot(at, [line.tokens_per_second(n, context) for n in at], "--", color="grey", label=ROOF)
        _concurrency(axis, mine)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.set_title(f"{mine[0].family}, T={temperature:g}", fontsize=11)
    axes[0].set_ylabel("tokens/s")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return figure


def _ratios(cells: Sequence[Cell]) -> Any:
    """auto / max(plain, best fixed), a line per family and temperature; bars from the worst round to the best."""
    figure = new_figure(7.0, 4.2)
    axis = figure.subplots()
    kinds = sorted({(cell.family, cell.temperature) for cell in cells})
    for place, ((family, temperature), colour) in enumerate(zip(kinds, COLOURS)):
        mine = sorted(
            (c for c in cells if (c.family, c.temperature) == (family, temperature)), key=lambda c: c.concurrency
        )
        found = [(c.concurrency, s) for c in mine if (s := never_slower(c)) is not None]
        at = [n * 2 ** (0.06 * (place - (len(kinds) - 1) / 2)) for n, _ in found]  # beside each other
        medians = [s.median for _, s in found]
        errors = [[s.median - s.low for _, s in found], [s.high - s.median for _, s in found]]
        label = f"{family}, T={temperature:g}"
        axis.errorbar(at, medians, yerr=errors, marker="o", markersize=4, color=colour, capsize=2, label=label)
    for level, style in ((1.0, "-"), (MEAN_RATIO, "--"), (WORST_RATIO, ":")):
        axis.axhline(level, color="grey", linewidth=0.9, linestyle=style)
    _concurrency(axis, cells)
    axis.set_ylabel("auto / max(plain, best fixed)")
    axis.legend(frameon=False)
    return figure


def _concurrency(axis: Any, cells: Sequence[Cell]) -> None:
    at = sorted({cell.concurrency for cell in cells})
    axis.set_xscale("log", base=2)
    axis.set_xticks(at, [str(n) for n in at])
    axis.minorticks_off()
    axis.set_xlabel("requests in flight")
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _save(path: Path, figure: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
