"""What a hybrid attention is made of, besides its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...feature_maps import FeatureMap
from ...notation import rotary_half
from ...recurrences import Recurrence


class HybridOptions(NamedTuple):
    """The constants and learned parts of one hybrid layer.

    Args:
        query_map: φ for queries.
        key_map: φ for keys.
        bias: b `[H]`, which opens or closes the linear part (see `linear_logit`).
        window: Visible keys of the softmax part, the query's own included.
        num_sinks: First tokens of each row, which stay in the softmax part.
        scale: Factor of the softmax scores, usually 1/√D.
        chunk_size: Tokens of one chunk of the parallel form.
        join: How window and linear past are weighed, "log" or "lolcats" (see `linear_logit`).
        recurrence: How the linear state decays; None if it does not.
    """

    query_map: FeatureMap
    key_map: FeatureMap
    bias: torch.Tensor
    window: int
    num_sinks: int
    scale: float
    chunk_size: int = 64
    join: str = "log"
    recurrence: Recurrence | None = None

    def scored(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part of queries or keys `[..., D or 2D]` that softmax attention is about: after rotary."""
        return rotary_half(x, self.query_map.head_dim, before=False)

    @property
    def uses_positions(self) -> bool:
        return self.query_map.uses_positions
