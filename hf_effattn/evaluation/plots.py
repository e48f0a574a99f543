"""The plots of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plotting import label_lengths, new_figure
from .base import TASKS
from .report import COSTS, Results
from .variants import PARTS, name_of_part


def plots(results: Results, folder: Path) -> list[Path]:
    """Draw scores, costs and, where they were measured, perplexity by position and ablations into `folder`; return the
    files.

    Raises:
        ImportError: without matplotlib.
    """
    found = [_scores(results, folder / "scores.png"), _costs(results, folder / "costs.png")]
    if any("by_position" in record for record in results.records):
        found.append(_positions(results, folder / "positions.png"))
    if results.ablated:
        found.append(_ablations(results, folder / "ablations.png"))
    return found


def _scores(results: Results, path: Path) -> Path:
    """One panel a task: the score against the length; with a single length, bars."""
    figure, axes = _panels(results.tasks)
    for axis, task in zip(axes, results.tasks, strict=True):
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
        axis.set_ylabel(TASKS.get(task).score_name)
        if TASKS.get(task).higher_is_better:
            _from_zero_to_one(axis)
        axis.grid(alpha=0.3)
    _legend(figure)
    return _saved(figure, path)


def _ablations(results: Results, path: Path) -> Path:
    """A panel for each task and each variant with parts: bars for the whole and the parts alone at each length, and a
    line at the score of the variant that is compared with."""
    pairs = [(whole, task) for whole in results.ablated for task in results.tasks]
    figure, axes = _panels([f"{task}\n{whole}" for whole, task in pairs])
    lengths = results.lengths
    for (whole, task), axis in zip(pairs, axes, strict=True):
        bars = {"whole": whole, **{f"{part} only": name_of_part(whole, part) for part in PARTS}}
        for step, (label, name) in enumerate(bars.items()):
            scores = [results.score(name, task, n) for n in lengths]
            places = [place + (step - 1) * 0.27 for place in range(len(lengths))]
            axis.bar(places, [math.nan if score is None else score for score in scores], 0.27, label=label)
        for place, n in enumerate(lengths):
            if (score := results.score(results.against, task, n)) is not None:
                axis.hlines(score, place - 0.45, place + 0.45, "black", "dashed", label=results.against)
        if TASKS.get(task).higher_is_better:
            _from_zero_to_one(axis)
        else:
            axis.set_yscale("log")
            axis.set_ylim(bottom=1)  # of perplexity the least: a bar is as long as the loss
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_xlabel("length [tokens]")
        axis.set_ylabel(TASKS.get(task).score_name)
        axis.grid(axis="y", alpha=0.3)
    _legend(figure)
    return _saved(figure, path)


def _costs(results: Results, path: Path) -> Path:
    """Cache bytes and tokens per second against the length, with a star where a variant begins to be cheaper."""
    figure = new_figure(figsize=(13.5, 3.6))
    labels = ("cache of a row [MB]", "prefill [tokens/s]", "decoding [tokens/s]")
    for axis, kind, label in zip(figure.subplots(1, 3), COSTS, labels, strict=True):
        for place, variant in enumerate(results.variants):
            costs = {n: cost for n in results.lengths if (cost := results.cost(kind, variant, n))}
            shown = {n: cost / 1e6 if kind == "cache" else 1 / cost for n, cost in costs.items()}
            if shown:
                axis.plot(list(shown), list(shown.values()), marker="o", color=f"C{place % 10}", label=variant)
            start = results.break_even(kind, variant)
            if start in shown:
                told = f"cheaper than {results.against} from here on"
                axis.plot(
                    [start], [shown[start]], "*", markersize=14, color="gold", markeredgecolor="black", label=told
                )
        label_lengths(axis, results.lengths)
        axis.set_ylim(bottom=0, top=1.1 * axis.dataLim.y1 if axis.lines else None)
        axis.set_xlabel("length [tokens]")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    _legend(figure)
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


def _panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, up to three in a row."""
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = new_figure(figsize=(4.5 * columns, 3.4 * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    for axis in axes[len(titles) :]:
        axis.remove()
    return figure, axes[: len(titles)]


def _from_zero_to_one(axis: Any) -> None:
    """Show what is between these at least."""
    low, high = axis.get_ylim()
    axis.set_ylim(min(0.0, low), max(1.05, high))


def _legend(figure: Any) -> None:
    """Put one legend below all panels."""
    pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    found = {label: handle for pair in pairs for handle, label in pair}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 4))


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
