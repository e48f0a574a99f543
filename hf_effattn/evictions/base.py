"""What an eviction is, and the registry of them."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch

from ..notation import coarse
from ..registry import Registry

EVICTIONS: Registry[type[Eviction]] = Registry("eviction")


class Evidence(NamedTuple):
    """What can be known when some keys must go.

    Args:
        keys, values: `[B, G, S, D]`, `[B, G, S, V]`.
        positions: Of the keys `[B, G, S]`, −1 for empty slots.
        mass: The weights that queries so far gave each key, summed, `[B, G, S]`, float32; for evictions that want it.
        queries: The last queries of each row, `[B, G, R, Q, D]`, for evictions that want them.
        num_tokens: Tokens each row has seen `[B]`.
        scale: Factor of the scores.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mass: torch.Tensor
    queries: torch.Tensor
    num_tokens: torch.Tensor
    scale: float

    def scores(self) -> torch.Tensor:
        """Return the scores of the last queries `[B, G, R, Q, S]`, float32; minus infinity for keys a query does not
        see, and for queries there have not been."""
        scores = torch.matmul(self.queries.float(), self.keys.float().transpose(2, 3)[:, :, None]) * self.scale
        number = self.queries.shape[3]
        at = self.num_tokens[:, None] - number + torch.arange(number, device=self.keys.device)  # [B, Q]
        seen = (self.positions[:, :, None] >= 0) & (self.positions[:, :, None] <= at[:, None, :, None])  # [B, G, Q, S]
        return scores.masked_fill(~seen[:, :, None], -torch.inf)

    def weights(self) -> torch.Tensor:
        """Return the attention weights of the last queries over these keys `[B, G, R, Q, S]`, float32."""
        return self.scores().softmax(dim=-1).nan_to_num(0.0)  # of queries there have not been


class Eviction:
    """Rates keys, for each row and key/value head by itself; the least important ones are given up."""

    num_queries: ClassVar[int] = 0  # last queries it looks at
    accumulates: ClassVar[bool] = False  # whether it looks at the sum of all weights so far

    def importance(self, evidence: Evidence) -> torch.Tensor:
        """Return how important each key is `[B, G, S]`, float32; what it says of empty slots does not count."""
        raise NotImplementedError

    def kept(self, evidence: Evidence, capacity: int) -> torch.Tensor:
        """Return the slots of the `capacity` most important keys `[B, G, capacity]`, the last tokens among them; empty
        ones where there are not so many.

        Importance counts to 11 bits, and of equals the later stays: so that repeated tokens, which some evictions find
        equal but for rounding, are decided upon alike in any batch. Slots must be in the order of positions.
        """
        positions = evidence.positions
        importance = coarse(self.importance(evidence))
        recent = positions >= evidence.num_tokens[:, None, None] - self.num_recent(capacity)
        importance = importance.masked_fill(recent, torch.inf).masked_fill(positions < 0, -torch.inf)
        order = importance.flip(2).argsort(dim=2, descending=True, stable=True)
        return positions.shape[2] - 1 - order[:, :, :capacity]

    def num_recent(self, capacity: int) -> int:
        """Return how many of the last tokens are kept in any case."""
        return 1
