"""What all our plots have in common. Needs matplotlib, which serving does not."""

from __future__ import annotations

from typing import Any

from decoding.errors import ConfigError

# Okabe and Ito's palette: told apart by everybody, and in print
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DPI = 150


def require() -> None:
    """Check that plots can be drawn, before anything is measured.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib, which is not installed; pip install 'saccade[bench]'") from None


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches; its ``savefig`` needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's state alone
    return figure
