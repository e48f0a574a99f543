"""What a sum of losses of single changes stands for in the loss of a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable

Ratios = tuple[tuple[float, float], ...]  # of a sum, and of what was measured of the whole to it


def ratios(sums: Iterable[float], measured: Iterable[float]) -> Ratios:
    """Return what the ratio is for sums where both are known, in the order of sums; those of no loss are left out."""
    return tuple(sorted((x, y / x) for x, y in zip(sums, measured, strict=True) if x > 0 and y > 0))


def ratio_at(known: Ratios, total: float) -> float:
    """Return the ratio for a sum: between those that are known along a power law, beyond them the nearest; 1 if none
    is known."""
    if not known:
        return 1.0
    below = [pair for pair in known if pair[0] <= total]
    above = [pair for pair in known if pair[0] > total]
    if not below or not above:
        return (below[-1] if below else above[0])[1]
    (low, first), (high, second) = below[-1], above[0]
    share = math.log(total / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))
