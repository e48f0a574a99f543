"""Past and present keys of a call, side by side in the order of their positions."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Stream(NamedTuple):
    """Keys in the order of their positions, of which the last T belong to the T queries.

    Args:
        key, value: `[B, G, S, D]`, `[B, G, S, V]`.
        first: Position of the first key of the stream: `[B]`, or an int where it is the same in all rows. Negative
            where a row has less past than others; entries at negative positions are seen by nobody.
        least: A lower bound of `first` over the rows.
        sink_key, sink_value: The first tokens of each row `[B, G, num_sinks, ·]`, or None if the stream starts at
            position 0 and has them itself.
    """

    key: torch.Tensor
    value: torch.Tensor
    first: torch.Tensor | int = 0
    least: int = 0
    sink_key: torch.Tensor | None = None
    sink_value: torch.Tensor | None = None

    def sinks(self, num_sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sink_key is None or self.sink_value is None:
            return self.key[:, :, :num_sinks], self.value[:, :, :num_sinks]
        return self.sink_key, self.sink_value

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Positions of entries start..end, `[B or 1, end − start]`."""
        index = torch.arange(start, end, device=self.key.device)
        return (index + self.first)[None] if isinstance(self.first, int) else index + self.first[:, None]
