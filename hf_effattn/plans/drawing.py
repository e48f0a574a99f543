"""The picture of a plan: what other budgets would lose, and which layer has what."""

from __future__ import annotations

import math
from typing import Any

from ..plotting import new_figure
from .budget import BYTES, Budget
from .plan import DENSE, PLAN, Plan

POINTS = 60


def draw(plan: Plan) -> Any:
    """Return the figure: left the loss by price, right the layers."""
    figure = new_figure(figsize=(12, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _frontier(left, plan)
    _layers(right, plan)
    return figure


def _frontier(axis: Any, plan: Plan) -> None:
    scale = 1e-6 if plan.budget.unit == BYTES else 1e3
    dense = plan.total(DENSE)
    prices = {name: plan.price_of(name) for name in plan.candidates}
    least, most = plan.least_price, max(prices.values())
    curve = []
    for number in range(POINTS + 1):
        limit = 1.0001 * least * (most / least) ** (number / POINTS)
        other = plan.for_budget(Budget(plan.budget.unit, limit))
        curve.append((other.price * scale, math.exp(other.predicted - dense)))
    axis.plot(*zip(*curve, strict=True), color="0.5", label="predicted")
    low, high = _range([y for _, y in curve] + [math.exp(plan.total(name) - dense) for name in plan.measured])
    for name in plan.candidates:
        lost = math.exp(plan.total(name) - dense)
        where, marker = (lost, "o") if lost <= high else (high, "^")
        told = f"{name} everywhere" + ("" if lost <= high else f": {lost:.3g}")
        axis.plot([prices[name] * scale], [where], marker, label=told, clip_on=False)
    if PLAN in plan.measured:
        axis.plot([plan.price * scale], [math.exp(plan.total(PLAN) - dense)], "k*", markersize=13, label=PLAN)
    axis.axvline(plan.budget.limit * scale, color="0.7", linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("cache of a row [MB]" if plan.budget.unit == BYTES else "decoding step [ms]")
    axis.set_ylabel("perplexity over dense, recall counted in")
    axis.set_ylim(low, high)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(-0.15, -0.14), ncols=2)  # below: it would hide points


def _range(values: list[float]) -> tuple[float, float]:
    """Return limits that leave out what is so bad that nothing else could be told apart."""
    shown = [value for value in values if value < 1.5] or values
    low, high = min(shown), max(shown)
    return low - 0.05 * (high - low) - 1e-4, high + 0.08 * (high - low) + 1e-4


def _layers(axis: Any, plan: Plan) -> None:
    """Each layer a column of candidates, coloured by what it would lose; the chosen one is marked."""
    import numpy as np
    from matplotlib.colors import SymLogNorm

    names = sorted(plan.candidates, key=plan.price_of)
    costs = np.array([[x.costs[name] - min(x.costs.values()) for x in plan.layers] for name in names])
    norm = SymLogNorm(linthresh=1e-3, vmin=0.0, vmax=max(float(costs.max()), 2e-3))
    size = 7 if plan.layers[0].head is None else 3
    image = axis.imshow(costs, aspect="auto", cmap="YlOrRd", norm=norm, origin="lower")
    axis.plot(
        range(len(plan.layers)), [names.index(x.choice) for x in plan.layers], "ks", markersize=size, fillstyle="none"
    )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    firsts = [i for i, x in enumerate(plan.layers) if not x.head]
    axis.set_xticks(firsts, [str(plan.layers[i].index) for i in firsts], fontsize=7)
    axis.set_xlabel("layer (square: chosen)")
    axis.figure.colorbar(image, ax=axis, label="loses more than its best [nats/token]")
