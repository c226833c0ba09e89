"""What a run measured on its way, as JSON lines and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.errors import TrainError

HISTORY_FILE = "training.jsonl"
PLOT_FILE = "training.png"


class History:
    """Rows of (step, seconds, split, metrics)."""

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows = rows if rows is not None else []

    def add(self, step: int, seconds: float, split: str, metrics: dict[str, float]) -> None:
        self.rows.append({"step": step, "seconds": round(seconds, 1), "split": split, **metrics})

    def last(self, split: str = "validation") -> dict[str, float]:
        """The newest metrics of a split, empty if there are none."""
        rows = [row for row in self.rows if row["split"] == split]
        return {k: v for k, v in rows[-1].items() if k not in ("step", "seconds", "split")} if rows else {}

    def write(self, folder: Path) -> None:
        """``training.jsonl`` and ``training.png``."""
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        (folder / HISTORY_FILE).write_text(lines, encoding="utf-8")
        self.plot(folder / PLOT_FILE)

    def plot(self, path: Path) -> None:
        """Loss over steps, and where there is one accuracy by depth."""
        pyplot = load_pyplot()
        by_depth = {k: v for k, v in self.last().items() if k.startswith("accuracy@")}
        figure, axes = pyplot.subplots(1, 2 if by_depth else 1, figsize=(10 if by_depth else 6, 4), squeeze=False)
        self._plot_loss(axes[0][0])
        if by_depth:
            depth = [int(name.partition("@")[2]) for name in by_depth]
            axes[0][1].bar(depth, list(by_depth.values()), color="tab:blue")
            for x, y in zip(depth, by_depth.values(), strict=True):
                axes[0][1].text(x, y, f"{y:.3f}", ha="center", va="bottom", fontsize=8)
            axes[0][1].set(xlabel="depth", ylabel="first choice right", title="Validation accuracy by depth")
            axes[0][1].set(ylim=(0, 1), xticks=depth)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def _plot_loss(self, axis: Any) -> None:
        for split, style in (("training", {"alpha": 0.4}), ("validation", {"marker": "o"})):
            rows = [row for row in self.rows if row["split"] == split]
            axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], label=split, **style)
        axis.set(xlabel="step", ylabel="loss", title="Loss")
        axis.grid(alpha=0.3)
        axis.legend()


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing into files.

    Raises:
        TrainError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise TrainError("plots need matplotlib: pip install 'saccade[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
