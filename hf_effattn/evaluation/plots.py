"""The plots of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .base import TASKS
from .report import RATES, Results


def plots(results: Results, folder: Path) -> list[Path]:
    """Draw scores, perplexity by position and costs into `folder`; return the files.

    Raises:
        ImportError: without matplotlib.
    """
    pyplot = _pyplot()
    found = [_scores(pyplot, results, folder / "scores.png"), _costs(pyplot, results, folder / "costs.png")]
    if any("by_position" in record for record in results.records):
        found.append(_positions(pyplot, results, folder / "positions.png"))
    return found


def _scores(pyplot: Any, results: Results, path: Path) -> Path:
    """One panel a task: the score against the length; with a single length, bars."""
    columns = min(len(results.tasks), 3)
    rows = -(-len(results.tasks) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, results.tasks, strict=False):
        for place, variant in enumerate(results.variants):
            points = [(n, s) for n in results.lengths if (s := results.score(variant, task, n)) is not None]
            if len(results.lengths) == 1:
                axis.bar([place], [s for _, s in points], label=variant)
            elif points:
                axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        if len(results.lengths) == 1:
            axis.set_xticks([])
        else:
            _lengths(axis, results.lengths)
            axis.set_xlabel("length [tokens]")
        axis.set_title(task)
        axis.set_ylabel(TASKS.get(task).score_name)
        if TASKS.get(task).higher_is_better:
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=max(1.05, axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(results.tasks) :]:
        axis.set_axis_off()
    _legend(figure, axes.flat[0])
    return _saved(pyplot, figure, path)


def _costs(pyplot: Any, results: Results, path: Path) -> Path:
    """Cache bytes and tokens per second against the length."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13.5, 3.6), layout="constrained")
    for variant in results.variants:
        held = [(n, b / 1e6) for n in results.lengths if (b := results.bytes(variant, n)) is not None]
        series = [held]
        for key in RATES.values():
            series.append([(n, 1 / s) for n in results.lengths if (s := results.seconds(variant, key, n))])
        for axis, points in zip(axes, series, strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=variant)
    labels = ("cache of a row [MB]", "prefill [tokens/s]", "decoding [tokens/s]")
    for axis, label in zip(axes, labels, strict=True):
        _lengths(axis, results.lengths)
        axis.set_ylim(bottom=0, top=1.1 * axis.dataLim.y1 if axis.lines else None)
        axis.set_xlabel("length [tokens]")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    return _saved(pyplot, figure, path)


def _positions(pyplot: Any, results: Results, path: Path) -> Path:
    """Perplexity by position in the passage, of the longest passages."""
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    bounds: list[int] = []
    for variant in results.variants:
        sums: dict[int, list[float]] = {}
        for record in results.of(variant, length=results.lengths[-1]):
            for bound, (loss, number) in record.get("by_position", {}).items():
                total = sums.setdefault(int(bound), [0.0, 0.0])
                total[0], total[1] = total[0] + loss, total[1] + number
        if sums:
            bounds = sorted(sums)
            axis.plot(bounds, [math.exp(sums[b][0] / sums[b][1]) for b in bounds], marker="o", label=variant)
    _lengths(axis, bounds)
    axis.set_yscale("log")
    axis.set_xlabel("position in the passage, up to")
    axis.set_ylabel("perplexity")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return _saved(pyplot, figure, path)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))


def _saved(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _lengths(axis: Any, lengths: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install hf_effattn[eval]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
