"""Plots of the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot cache bytes and decoding time against context length, one line a variant.

    Args:
        results: For each variant "contexts", "cache_bytes" and "decode_seconds", lists of one length.
        path: Where the PNG goes.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install hf_effattn[plots]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("cache_bytes", 1e-6, "cache [MB]"), ("decode_seconds", 1e3, "one decoding step [ms]"))
    for axis, (key, factor, label) in zip(axes, panels, strict=True):
        for name, result in results.items():
            axis.plot(result["contexts"], [value * factor for value in result[key]], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(next(iter(results.values()))["contexts"])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.tick_params(axis="x", rotation=30)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context [tokens]")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
