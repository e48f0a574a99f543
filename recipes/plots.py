"""Plots of the recipes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tables import BASELINES, YARDSTICKS


def curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot cache bytes and decoding time against context length, one line a variant.

    Args:
        results: For each variant "contexts", "cache_bytes" and "decode_seconds", lists of one length.
        path: Where the PNG goes.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("cache_bytes", 1e-6, "cache [MB]"), ("decode_seconds", 1e3, "one decoding step [ms]"))
    for axis, (key, factor, label) in zip(axes, panels, strict=True):
        for name, result in results.items():
            axis.plot(result["contexts"], [value * factor for value in result[key]], marker="o", label=name)
        _lengths(axis, next(iter(results.values()))["contexts"])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context [tokens]")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def ratios(seconds: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Plot how many times faster than dense attention each variant is against the length, one panel a suite.

    Args:
        seconds: For each suite and length the seconds of all variants.
        path: Where the PNG goes.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(seconds), figsize=(5 * len(seconds), 6), layout="constrained", squeeze=False)
    colors = pyplot.get_cmap("tab20").colors
    for axis, (suite, times) in zip(axes[0], seconds.items(), strict=True):
        dense = BASELINES[suite]
        names = dict.fromkeys(name for row in times.values() for name in row if name not in (*YARDSTICKS, dense))
        for name, color in zip(names, itertools.cycle(colors), strict=False):
            points = [(n, row[dense] / row[name]) for n, row in times.items() if name in row]
            axis.plot(*zip(*points, strict=True), marker="o", label=name, color=color)
        axis.axhline(1.0, color="black", linewidth=1)
        _lengths(axis, list(times))
        axis.set_yscale("log")
        axis.set_title(suite)
        axis.set_xlabel("tokens")
        axis.set_ylabel(f"time of {dense} / time")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install hf_effattn[plots]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _lengths(axis: Any, lengths: list[int]) -> None:
    """Label a logarithmic axis with these lengths."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", rotation=30)
