"""What a cache must keep for a pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Retention:
    """What a cache must keep: key k may be forgotten at query q unless `q − k < window` or k is pinned.

    Args:
        window: Number of most recent positions kept, the query's own included; None keeps every key.
        pinned: Positions kept forever.
    """

    window: int | None = None
    pinned: frozenset[int] = frozenset()

    def keeps(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return, for integer positions `query` and `key` of broadcastable shape, whether the key is still kept."""
        if self.window is None:
            return torch.ones_like(query - key, dtype=torch.bool)
        pinned = torch.isin(key, torch.tensor(sorted(self.pinned), dtype=key.dtype, device=key.device))
        return (query - key < self.window) | pinned

    def __or__(self, other: Retention) -> Retention:
        """Keep what either keeps."""
        if self.window is None or other.window is None:
            return Retention()
        return Retention(max(self.window, other.window), self.pinned | other.pinned)

    def __and__(self, other: Retention) -> Retention:
        """Keep what both keep (and possibly a little more: the result is again a window and pinned positions)."""
        if self.window is None:
            return other
        if other.window is None:
            return self
        window = min(self.window, other.window)
        if self.pinned - other.pinned:
            window = max(window, other.window)
        if other.pinned - self.pinned:
            window = max(window, self.window)
        return Retention(window, self.pinned & other.pinned)
