"""What single changes cost, apart from what is chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..plans import Loss
from ..plans.heads import Unit


class Chance(NamedTuple):
    """What is measured of changes that change nothing but how sums are rounded, which in 16 bits is seen, and which
    adds up over layers where it would not in a model.

    Args:
        divergences: By layer.
        recall: The size of the change, either way.
    """

    divergences: dict[int, float]
    recall: float

    @classmethod
    def of(cls, start: Loss, controls: Mapping[Unit, Loss]) -> Chance:
        """Return it from such changes of one unit in each layer.

        Args:
            start: The losses without any change.
        """
        squares = [(loss.recall - start.recall) ** 2 for loss in controls.values()]
        divergences = {unit.layer: loss.divergence - start.divergence for unit, loss in controls.items()}
        return cls(divergences, 2 * math.sqrt(sum(squares) / len(squares)))

    def cost(self, layer: int, loss: Loss, start: Loss, recall_weight: float) -> float:
        """Return the nats a token that a change in a layer costs; recall that has no weight need not be known."""
        divergence = _beyond(loss.divergence - start.divergence, self.divergences.get(layer, 0.0))
        if not recall_weight:
            return divergence
        return divergence + recall_weight * _beyond(loss.recall - start.recall, self.recall)


def _beyond(change: float, chance: float) -> float:
    return math.copysign(max(abs(change) - max(chance, 0.0), 0.0), change)
