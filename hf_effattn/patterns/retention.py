"""What a cache must keep for a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..notation import whole_number


@dataclass(frozen=True)
class Retention:
    """What a cache must keep: key k may be forgotten at query q unless `q − k < window`, or k is pinned or in a column.

    Args:
        window: Number of most recent positions kept, the query's own included; None keeps every key.
        pinned: Positions kept forever.
        columns: `(stride, number)`: the last `number` positions of every `stride` are kept forever, too.
    """

    window: int | None = None
    pinned: frozenset[int] = frozenset()
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.columns is not None:
            stride, number = self.columns
            whole_number("stride of columns", stride, 1)
            if whole_number("number of columns", number, 1) > stride:
                raise ValueError(f"number of columns must be at most their stride ({stride}); got {number}")

    @property
    def is_bounded(self) -> bool:
        """Whether what is kept stops growing with the text."""
        return self.window is not None and self.columns is None

    def keeps(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return, for integer positions `query` and `key` of broadcastable shape, whether the key is still kept."""
        if self.window is None:
            return torch.ones_like(query - key, dtype=torch.bool)
        pinned = torch.isin(key, torch.tensor(sorted(self.pinned), dtype=key.dtype, device=key.device))
        kept = (query - key < self.window) | pinned
        return kept if self.columns is None else kept | in_columns(key, *self.columns)

    def __or__(self, other: Retention) -> Retention:
        """Keep what either keeps (or everything, where both have columns of their own)."""
        columns = {x.columns for x in (self, other)} - {None}
        if self.window is None or other.window is None or len(columns) > 1:
            return Retention()
        return Retention(max(self.window, other.window), self.pinned | other.pinned, *columns)

    def __and__(self, other: Retention) -> Retention:
        """Keep what both keep (and possibly more: the result is again a window, pinned positions and columns)."""
        if self.window is None:
            return other
        if other.window is None:
            return self
        if self.columns != other.columns:  # what one of them keeps will do
            return self if self.is_bounded else other
        window = min(self.window, other.window)
        if self.pinned - other.pinned:
            window = max(window, other.window)
        if other.pinned - self.pinned:
            window = max(window, self.window)
        return Retention(window, self.pinned & other.pinned, self.columns)


def in_columns(position: Any, stride: int, number: int) -> Any:
    """Return whether `position`, a number or a tensor of them, is among the last `number` of a `stride`."""
    return position % stride >= stride - number
