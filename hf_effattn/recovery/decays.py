"""The decay of a recurrence that forgets as softmax attention looks away."""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 256  # queries whose attention weights are there at once
FASTEST = 5.0  # rate at which less than 1 % is left after one token


class Far(NamedTuple):
    """What softmax attention does with the keys that a linear state holds.

    Args:
        counts: Keys in the state at each query `[N]`; mass: the attention that these get, of key/value heads `[G, N]`.
        distance: Sum over queries and keys of this attention times how many tokens ago the key came into the state
            `[G]`.
    """

    counts: torch.Tensor
    mass: torch.Tensor
    distance: torch.Tensor

    def joined(self, other: Far) -> Far:
        """Return the same of both texts."""
        counts = torch.cat((self.counts, other.counts))
        return Far(counts, torch.cat((self.mass, other.mass), dim=1), self.distance + other.distance)


def far_attention(query: torch.Tensor, key: torch.Tensor, scale: float, window: int, num_sinks: int) -> Far:
    """Return how much softmax attention gives to keys beyond `window` and sinks, and how far beyond (the mean distance
    of attention: Vig and Belinkov 2019, arXiv 1906.04284).

    Args:
        query: `[B, H, T, D]`; key `[B, G, T, D]`; scale: of the scores; window and num_sinks: of the layer, or 0.
    """
    places = torch.arange(query.shape[2], device=query.device)
    queries, key = query.float().unflatten(1, (key.shape[1], -1)), key.float()
    masses, distance = [], torch.zeros(key.shape[1], device=key.device)
    for rows in places.split(BLOCK):
        ago = rows[:, None] - places
        scores = torch.einsum("bgrtd,bgsd->bgrts", queries[:, :, :, rows], key) * scale
        weights = scores.masked_fill(ago < 0, -torch.inf).softmax(dim=-1).sum(dim=(0, 2))  # [G, t, S]
        weights = weights * ((ago >= window) & (places >= num_sinks))
        masses.append(weights.sum(dim=-1))
        distance += (weights * (ago - window)).sum(dim=(1, 2))
    return Far((places + 1 - window - num_sinks).clamp(min=0), torch.cat(masses, dim=1), distance)


def decay_rate(far: Far) -> torch.Tensor:
    """Return the rate r `[G]` with which keys that count `e^{−r·distance}` are, in the mean, as far away as those that
    softmax attention looks at; `α = e^{−r}` is then the decay of largest likelihood.

    Among n keys the mean distance is `1/(e^r − 1) − n/(e^{rn} − 1)`: for long texts `α = d/(1+d)` of the mean distance
    d. It falls with r, so r is found by bisection. Slower than 1/n is not told from no decay at all.
    """
    counts, mass, distance = (x.to("cpu", torch.float64) for x in far)
    counts, mass = counts[counts > 0], mass[:, counts > 0]
    low = mass.new_full(mass.shape[:1], 1.0 / max([2.0, *counts.tolist()]))
    high = torch.full_like(low, FASTEST)
    for _ in range(50):
        rate = ((low + high) / 2)[:, None]
        means = 1 / rate.expm1() - counts / (rate * counts).expm1()
        too_far = (mass * means).sum(dim=1) > distance
        low, high = torch.where(too_far, rate[:, 0], low), torch.where(too_far, high, rate[:, 0])
    return ((low + high) / 2).to(far.distance)
