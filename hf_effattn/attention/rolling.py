"""A window with sinks whose positions roll on: for streams far beyond the length a model was trained for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..cache import KeyValueState
from ..config import SparseConfig
from ..notation import compute_dtype
from .base import MECHANISMS
from .call import Call
from .geometry import HeadGeometry
from .sparse import SparseAttention


@MECHANISMS.register("rolling")
class RollingAttention(SparseAttention):
    """Sliding window and sinks with positions counted within the cache (StreamingLLM, Xiao 2023, arXiv 2309.17453).

    Rotary scores depend on distances only, and within the window these are what they are. To the sinks the distance of
    a query stops growing: it is turned as if at position `num_sinks + window − 1`, the last slot of a full cache. So
    keys are kept as they are, and only the query meets the sinks in a form of its own.

    Args:
        config: A pattern that is a window with sinks.
        geometry: Heads and head dimension of the layer.
    """

    rolls = True
    rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # set where a layer is converted

    def __init__(self, config: SparseConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        band = self.pattern.band
        assert band is not None
        assert band.window is not None
        self.num_sinks, self.window = band.num_sinks, band.window
        self.last = self.num_sinks + self.window - 1

    def describe(self) -> str:
        return f"{super().describe()} rolling"

    def _forms(self, query: torch.Tensor, first: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return queries `[B, H, T, D]` and the form in which they meet the sinks; None while that is the same.

        Args:
            query: `[B, H, T, 2D]`: after rotary, and before.
            first: Position of the first of them in each row `[B]`; most: a bound of it.
        """
        dim, tokens = self.geometry.head_dim, query.shape[2]
        if most + tokens - 1 <= self.last:  # no query has left the positions of the cache
            return query[..., :dim], None
        positions = first[:, None] + torch.arange(tokens, device=query.device)
        return query[..., :dim], self.rotate(query[..., dim:], positions.clamp(max=self.last))

    def _attend_band(
        self, state: KeyValueState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> torch.Tensor:
        query, rolled = self._forms(query, state.num_tokens, state.most)
        both = query if rolled is None else torch.cat((query, rolled), dim=-1)
        return super()._attend_band(state, both, key, value, call)

    def _attend_one(self, state: KeyValueState, query: torch.Tensor, call: Call) -> torch.Tensor:
        query, rolled = self._forms(query, state.num_tokens - 1, state.most - 1)
        if rolled is None:
            return super()._attend_one(state, query, call)
        batch, heads, _, _ = query.shape
        sinks, kv_heads, dtype = self.num_sinks, state.keys.shape[1], compute_dtype(query.dtype)
        folded = (x.reshape(batch, kv_heads, heads // kv_heads, -1).to(dtype) for x in (rolled, query))
        keys = (x.to(dtype).transpose(2, 3) for x in (state.keys[:, :, :sinks], state.keys[:, :, sinks:]))
        scores = torch.cat([torch.matmul(q, k) for q, k in zip(folded, keys, strict=True)], dim=-1).float() * call.scale
        if state.least - self.store.num_leading < self.window:  # a slot may be empty
            last = state.num_tokens[:, None] - 1
            scores = scores.masked_fill(~self.pattern.visible(last, state.positions), -torch.inf)
        weights = scores.softmax(dim=-1).to(dtype)
        return torch.matmul(weights, state.values.to(dtype)).view(batch, heads, 1, -1).to(query.dtype)
