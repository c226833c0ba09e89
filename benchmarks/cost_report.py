"""``saccade report costs``: the table that the planner weighs drafts by, as text and as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures
from decoding.assemble import build_drafters, build_stepper, load_target
from decoding.auto_planner import AutoPlanner
from decoding.config import Dtype, EngineConfig
from decoding.cost_file import learn_costs
from decoding.costs import CostTable
from decoding.drafters.base import ChoosingDrafter
from decoding.errors import ConfigError

SHOWN_ROWS = (1, 4, 16)


@dataclass(frozen=True)
class Options:
    """The command line. Each default is written here once."""

    model: str
    speculate: tuple[str, ...] = ()
    anew: bool = False
    plot: Path | None = None
    dtype: Dtype = EngineConfig.dtype
    quantization: str = EngineConfig.quantization
    device: str = EngineConfig.device
    threads: int | None = None
    tensor_parallel_size: int = EngineConfig.tensor_parallel_size


def report(options: Options) -> str:
    """Measure, or read what was measured, and return the text to print.

    Raises:
        ConfigError: a model or settings that cannot work; a plot that cannot be drawn or written.
    """
    if options.plot is not None:
        figures.require()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = EngineConfig(
        options.model,
        speculate=options.speculate or ("ngram",),  # without a drafter nothing is weighed
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        tensor_parallel_size=options.tensor_parallel_size,
    )
    loaded = load_target(config)
    stepper = build_stepper(config, loaded, build_drafters(config, loaded))
    learn_costs(stepper, config, loaded.vocab_size, loaded.folder, anew=options.anew)
    loaded.close()
    assert isinstance(stepper.planner, AutoPlanner)  # config.plan is auto
    table = stepper.planner.costs.table
    text = render(table, f"{options.model}, {config.dtype}, {loaded.target.device}, {torch.get_num_threads()} threads")
    choosing = [drafter for drafter in stepper.drafters.members if isinstance(drafter, ChoosingDrafter)]
    text += "".join(f"\n\n{drafter.name}: {drafter.choice}" for drafter in choosing)
    if options.plot is None:
        return text
    try:
        draw(table).savefig(options.plot, dpi=figures.DPI)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {options.plot} cannot be written: {error}") from error
    return f"{text}\nwritten to {options.plot}"


def render(table: CostTable, title: str) -> str:
    """The table in milliseconds."""
    first = table.seconds[0]
    lines = [title, "", "query tokens of a step   ms   x one token"]
    for tokens, seconds in zip(table.tokens, table.seconds, strict=True):
        lines.append(f"{tokens:20} {1e3 * seconds:8.3f} {seconds / first:8.2f}")
    lines.append(f"each further row {1e3 * table.row:.4f} ms, each 1000 tokens of context {1e6 * table.context:.4f} ms")
    for name, price in table.drafters.items():
        lines += ["", f"{name}, ms by depth" + "".join(f"{f'{rows} rows':>10}" for rows in SHOWN_ROWS)]
        for depth in (1, 2, 4, 8):
            shown = "".join(f"{1e3 * price.seconds(rows, depth):10.3f}" for rows in SHOWN_ROWS)
            lines.append(f"{depth:>{len(name) + 13}}" + shown)
    return "\n".join(lines)


def draw(table: CostTable) -> Any:
    """Step time over query tokens, drafting time over depth."""
    figure = figures.new_figure(9.0, 3.6)
    steps, drafting = figure.subplots(1, 2)
    steps.plot(table.tokens, [1e3 * seconds for seconds in table.seconds], marker="o", color=figures.COLOURS[0])
    steps.set(xscale="log", xlabel="query tokens", ylabel="ms", ylim=(0, None), title="a step")
    steps.set_xticks([1, 4, 16, 64, 256], labels=["1", "4", "16", "64", "256"])
    for colour, (name, price) in zip(figures.COLOURS, table.drafters.items()):
        for rows, style in zip(SHOWN_ROWS, ("-", "--", ":"), strict=True):
            points = [1e3 * price.seconds(rows, depth) for depth in range(1, 9)]
            label = f"{name}, {rows} row{'s' if rows > 1 else ''}"
            drafting.plot(range(1, 9), points, style, color=colour, label=label)
    drafting.set(xlabel="depth", ylabel="ms", ylim=(0, None), title="drafting")
    if table.drafters:
        drafting.legend(fontsize="small")
    return figure
