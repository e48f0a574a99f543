"""matplotlib, which is optional: imported here only, and when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def new_figure(**options: Any) -> Any:
    """Return a figure of matplotlib that belongs to no window and is gone when it is no longer used.

    Args:
        options: Of `matplotlib.figure.Figure`.

    Raises:
        ImportError: without matplotlib, which the extra `plots` installs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_effattn[plots]'") from error
    return Figure(layout="constrained", **options)


def label_lengths(axis: Any, lengths: Sequence[int], rotation: float = 0.0) -> None:
    """Make the horizontal axis logarithmic and label it with these lengths."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", rotation=rotation)


def many_colors() -> Any:
    """Return twenty colours that can be told apart."""
    from matplotlib import colormaps

    return colormaps["tab20"].colors  # type: ignore[attr-defined]
