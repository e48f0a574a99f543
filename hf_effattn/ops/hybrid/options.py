"""What a hybrid attention is made of, besides its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ...feature_maps import FeatureMap
from ...notation import rotary_half
from ...recurrences import Recurrence
from ..linear.plan import Plan

NOTHING = 1e-30  # a linear denominator up to this means: no past, or none that resembles the query


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
        recurrence: How the linear state goes from token to token; None for a plain sum.
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

    def plan(
        self,
        query_at: torch.Tensor | None = None,
        key_at: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> Plan:
        """Return the plan of the linear part for tokens at these positions."""
        return Plan(self.query_map, self.key_map, self.chunk_size, query_at, key_at, real, self.recurrence)

    def linear_value(self, sums: torch.Tensor) -> torch.Tensor:
        """Return `o_lin` `[·, G, R·C, V]`, the output of the linear part by itself.

        Args:
            sums: What queries read from the state: numerators and denominators `[·, G, R·C, V+1]`.
        """
        return self.plan().output(sums, NOTHING)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What has learned parameters, `bias` excepted."""
        return self.plan().modules

    @property
    def uses_positions(self) -> bool:
        return self.query_map.uses_positions
