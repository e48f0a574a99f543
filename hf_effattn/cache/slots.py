"""Which slot of a store holds which position.

First come the pinned positions, then a ring of the last `window` positions (or, where everything is kept, all of them).
Storage grows in steps of `GROWTH` slots until the ring is whole and never after, but for columns: where a retention has
them, the ring is whole from the first token on and they grow behind it, empty in the ring. Positions count the real
tokens of each row, so rows with different padding have their own rings.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from ..patterns import Retention
from ..patterns.retention import in_columns

GROWTH = 256
Index = TypeVar("Index", int, torch.Tensor)


class Slots:
    """The slots of a retention.

    Args:
        retention: What to keep.
    """

    def __init__(self, retention: Retention) -> None:
        self.window = None if retention.window is None else max(retention.window, 1)
        self.pinned = [] if retention.window is None else sorted(retention.pinned)
        self.columns = None if retention.window is None else retention.columns
        self.num_leading = next((i for i, p in enumerate(self.pinned) if i != p), len(self.pinned))

    def num_slots(self, num_tokens: int) -> int:
        """Return how many slots are allocated once `num_tokens` have come."""
        if self.columns is not None and self.window is not None:
            stride, number = self.columns
            come = num_tokens // stride * number + max(num_tokens % stride - stride + number, 0)
            return len(self.pinned) + self.window + _rounded(come)
        ring = _rounded(max(num_tokens - self.num_leading, 0))
        return len(self.pinned) + (ring if self.window is None else min(ring, self.window))

    @property
    def _last_pinned(self) -> int:
        return self.pinned[-1] if self.pinned else -1

    def _ring_slot(self, position: Index) -> Index:
        """Slot of the ring that `position` takes, for a number or a tensor of them."""
        offset = position - self.num_leading
        return len(self.pinned) + (offset if self.window is None else offset % self.window)

    def _column_slot(self, position: Index) -> Index:
        """Slot behind the ring that `position` takes if it is in a column."""
        assert self.columns is not None
        assert self.window is not None
        stride, number = self.columns
        index = position // stride * number + position % stride - (stride - number)
        return len(self.pinned) + self.window + index

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Slot that each of `positions` `[B]` takes."""
        slots = self._ring_slot(positions)
        if self.columns is not None:
            slots = torch.where(in_columns(positions, *self.columns), self._column_slot(positions), slots)
        if not self.pinned:
            return slots
        is_pinned = positions[:, None] == torch.tensor(self.pinned, device=positions.device)
        return torch.where(is_pinned.any(dim=1), is_pinned.to(torch.uint8).argmax(dim=1), slots)

    def _held(self, num_tokens: torch.Tensor, slots: int) -> torch.Tensor:
        """Position that each slot holds after `num_tokens` `[B]` tokens, −1 for none, `[B, slots]`."""
        others = slots - len(self.pinned)
        in_ring = others if self.columns is None or self.window is None else self.window
        ring = torch.arange(in_ring, device=num_tokens.device)
        last = num_tokens[:, None] - 1 - self.num_leading
        offset = ring.expand(num_tokens.shape[0], -1) if self.window is None else last - (last - ring) % self.window
        held = offset + self.num_leading
        held = held.masked_fill((offset < 0) | (offset > last), -1)
        if self.columns is not None:
            stride, number = self.columns
            index = torch.arange(others - in_ring, device=num_tokens.device)
            kept = index // number * stride + stride - number + index % number
            arrived = torch.where(kept < num_tokens[:, None], kept, -1)
            held = torch.cat((held.masked_fill(in_columns(held, *self.columns), -1), arrived), dim=1)
        if not self.pinned:
            return held
        pinned = torch.tensor(self.pinned, device=num_tokens.device)
        held = held.masked_fill(torch.isin(held, pinned), -1)
        arrived = torch.where(pinned < num_tokens[:, None], pinned, -1)
        return torch.cat((arrived, held), dim=1)


def _rounded(number: int) -> int:
    """Return `number` of slots in steps of `GROWTH`."""
    return -(-number // GROWTH) * GROWTH
