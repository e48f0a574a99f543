"""Plots of the recipes."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from tables import BASELINES, YARDSTICKS

from hf_effattn.plotting import label_lengths, many_colors, new_figure

ROTATION = 30  # of lengths, degrees


def curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot cache bytes and decoding time against context length, one line a variant.

    Args:
        results: For each variant "contexts", "cache_bytes" and "decode_seconds", lists of one length.
        path: Where the PNG goes.
    """
    figure = new_figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    panels = (("cache_bytes", 1e-6, "cache [MB]"), ("decode_seconds", 1e3, "one decoding step [ms]"))
    for axis, (key, factor, label) in zip(axes, panels, strict=True):
        for name, result in results.items():
            axis.plot(result["contexts"], [value * factor for value in result[key]], marker="o", label=name)
        label_lengths(axis, next(iter(results.values()))["contexts"], ROTATION)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context [tokens]")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def ratios(seconds: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Plot how many times faster than dense attention each variant is against the length, one panel a suite.

    Args:
        seconds: For each suite and length the seconds of all variants.
        path: Where the PNG goes.
    """
    figure = new_figure(figsize=(5 * len(seconds), 6))
    axes = figure.subplots(1, len(seconds), squeeze=False)
    left_out = {*YARDSTICKS, *(BASELINES[suite] for suite in seconds)}
    names = dict.fromkeys(name for times in seconds.values() for row in times.values() for name in row)
    colors = dict(zip([name for name in names if name not in left_out], cycle(many_colors()), strict=False))
    shown: dict[str, Any] = {}
    for axis, (suite, times) in zip(axes[0], seconds.items(), strict=True):
        dense = BASELINES[suite]
        for name, color in colors.items():
            points = [(n, row[dense] / row[name]) for n, row in times.items() if name in row]
            if points:
                shown[name] = axis.plot(*zip(*points, strict=True), marker="o", color=color)[0]
        axis.axhline(1.0, color="black", linewidth=1)
        label_lengths(axis, list(times), ROTATION)
        axis.set_yscale("log")
        axis.set_title(suite)
        axis.set_xlabel("tokens")
        axis.set_ylabel(f"time of {dense} / time")
        axis.grid(alpha=0.3)
    figure.legend(list(shown.values()), list(shown), fontsize="small", loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def training(log: list[dict[str, Any]], path: Path) -> None:
    """Plot the losses of training steps, and the divergence from the teacher on windows that are held out.

    Args:
        log: What `runs.Run` logged: of steps "stage", "step", "loss" and "window", of validations "step" and "kl".
        path: Where the PNG goes.
    """
    figure = new_figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    for axis, stage in zip(axes, ("transfer", "distill"), strict=True):
        for label, narrow in (("a step", False), ("its window narrowed", True)):
            rows = [row for row in log if row["stage"] == stage and _narrowed(row) == narrow]
            if rows:
                axis.plot([x["step"] for x in rows], [x["loss"] for x in rows], ".", markersize=3, label=label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    held_out = [row for row in log if row["stage"] == "validation"]
    axes[1].plot([x["step"] for x in held_out], [x["kl"] for x in held_out], "k-o", label="held out")
    axes[1].set_yscale("log")
    axes[0].set_ylabel("attention transfer: relative error, sum of layers")
    axes[1].set_ylabel("distillation: KL [nats/token]")
    axes[1].legend()
    figure.savefig(path, dpi=120)


def _narrowed(row: dict[str, Any]) -> bool:
    return row["stage"] == "distill" and row["window"] is not None
