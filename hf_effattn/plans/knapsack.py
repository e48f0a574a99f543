"""The choice of one candidate a layer under a limit: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

STEPS = 20_000  # into which the limit is divided; prices are rounded up, so that it is never exceeded


def choose(costs: Sequence[Sequence[float]], prices: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """Return the candidate of each layer with which the sum of costs is least and that of prices within the limit.

    Dynamic programming over layers and spent parts of the limit; of equal sums the cheaper one wins. Prices are rounded
    up to a 20,000th of the limit: what fits by less may be missed, what is chosen fits. It is an optimum of a sum, so
    it is as right as costs of layers add up.

    Args:
        costs: Of each layer and candidate.
        prices: Likewise; none negative.
        limit: The most that all prices may add up to.

    Returns:
        Indices of candidates; None if even the cheapest ones are too much.
    """
    unit = limit / STEPS if limit > 0 else 1.0
    best = torch.zeros(STEPS + 1, dtype=torch.float64)  # least cost with at most so much spent
    chosen = []
    for layer_costs, layer_prices in zip(costs, prices, strict=True):
        least, index = torch.full_like(best, torch.inf), torch.zeros(STEPS + 1, dtype=torch.long)
        for candidate, (cost, price) in enumerate(zip(layer_costs, layer_prices, strict=True)):
            spent = _steps(price, unit)
            if spent > STEPS:
                continue
            own, before = best[: STEPS + 1 - spent] + cost, least[spent:]
            index[spent:].masked_fill_(own < before, candidate)
            torch.minimum(own, before, out=before)
        best = least
        chosen.append(index)
    if not torch.isfinite(best[-1]):
        cheapest = [min(range(len(row)), key=row.__getitem__) for row in prices]
        fits = sum(row[i] for row, i in zip(prices, cheapest, strict=True)) <= limit
        return cheapest if fits else None  # what fits by less than the rounding is the only choice
    left = int((best == best[-1]).nonzero()[0])
    result = []
    for layer, index in reversed(list(enumerate(chosen))):
        candidate = int(index[left])
        left -= _steps(prices[layer][candidate], unit)
        result.append(candidate)
    return result[::-1]


def _steps(price: float, unit: float) -> int:
    # A price that is a whole number of steps but for rounding is that number.
    steps = price / unit
    return round(steps) if abs(steps - round(steps)) < 1e-6 else int(steps) + 1
