"""The plots of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..plotting import label_lengths, new_figure
from .base import TASKS
from .report import RATES, Results


def plots(results: Results, folder: Path) -> list[Path]:
    """Draw scores, perplexity by position and costs into `folder`; return the files.

    Raises:
        ImportError: without matplotlib.
    """
    found = [_scores(results, folder / "scores.png"), _costs(results, folder / "costs.png")]
    if any("by_position" in record for record in results.records):
        found.append(_positions(results, folder / "positions.png"))
    return found


def _scores(results: Results, path: Path) -> Path:
    """One panel a task: the score against the length; with a single length, bars."""
    columns = min(len(results.tasks), 3)
    rows = -(-len(results.tasks) // columns)
    figure = new_figure(figsize=(4.5 * columns, 3.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
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
            label_lengths(axis, results.lengths)
            axis.set_xlabel("length [tokens]")
        axis.set_title(task)
        axis.set_ylabel(TASKS.get(task).score_name)
        if TASKS.get(task).higher_is_better:
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=max(1.05, axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(results.tasks) :]:
        axis.set_axis_off()
    _legend(figure, axes.flat[0])
    return _saved(figure, path)


def _costs(results: Results, path: Path) -> Path:
    """Cache bytes and tokens per second against the length."""
    figure = new_figure(figsize=(13.5, 3.6))
    axes = figure.subplots(1, 3)
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
        label_lengths(axis, results.lengths)
        axis.set_ylim(bottom=0, top=1.1 * axis.dataLim.y1 if axis.lines else None)
        axis.set_xlabel("length [tokens]")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    return _saved(figure, path)


def _positions(results: Results, path: Path) -> Path:
    """Perplexity by position in the passage, of the longest passages."""
    figure = new_figure(figsize=(6, 4))
    axis = figure.subplots()
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
    label_lengths(axis, bounds)
    axis.set_yscale("log")
    axis.set_xlabel("position in the passage, up to")
    axis.set_ylabel("perplexity")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return _saved(figure, path)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
