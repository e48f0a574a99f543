"""Sparse attention: softmax over the keys a pattern shows, and a store that keeps no more than the pattern needs."""

from __future__ import annotations

import torch

from ..cache import KeyValueState, KeyValueStore
from ..config import SparseConfig
from ..ops.sparse import banded, choose_backend, masked, reference
from .base import MECHANISMS, Call, HeadGeometry, Mechanism


@MECHANISMS.register("sparse")
class SparseAttention(Mechanism):
    """Softmax attention under a pattern (see `hf_effattn.patterns`), without learned parameters.

    Args:
        config: The pattern and the backend.
        geometry: Heads and head dimension of the layer.
    """

    options: SparseConfig

    def __init__(self, config: SparseConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        self.pattern = config.resolve()
        self.store = KeyValueStore(self.pattern.retention)

    def attend(
        self, state: KeyValueState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, KeyValueState]:
        state = self.store.empty(key, value) if state is None else self.store.matching(state, key)
        backend = self.backend()
        if query.shape[2] == 1 and backend != "reference":
            state = self.store.append(state, key, value, call.lengths, call.in_place)
            return self._attend_one(state, query, call), state
        if backend == "banded":
            assert self.pattern.band is not None
            stream = self.store.stream(state, key, value, self.pattern.band.window - 1)
            output = banded.sparse_attention(query, stream, self.pattern.band, call.scale, call.dropout)
        else:
            output = self._attend_positions(state, query, key, value, call)
        return output, self.store.append(state, key, value, call.lengths) if call.keep_state else state

    def fixed(self, state: KeyValueState, max_length: int) -> KeyValueState:
        return self.store.fixed(state, max_length)

    def num_visible(self, context_length: int) -> int:
        return self.pattern.num_visible(context_length - 1)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g = self.geometry
        return self.store.nbytes(context_length, g.num_kv_heads, g.head_dim, g.value_dim, dtype)

    def flops_per_token(self, context_length: int) -> int:
        return self.geometry.softmax_flops(self.num_visible(context_length))

    def backend(self) -> str:
        return choose_backend(self.pattern, self.options.backend)

    def describe(self) -> str:
        return f"sparse {self.pattern.describe()}"

    def _attend_one(self, state: KeyValueState, query: torch.Tensor, call: Call) -> torch.Tensor:
        """Attend with one query, the last token of `state`, to whatever slots it sees."""
        window, leading = self.store.window, self.store.num_leading
        if self.pattern.band and window is not None and state.least - leading >= window > 1:
            return masked.attend(query, state.keys, state.values, None, call.scale, call.dropout)
        last = state.num_tokens[:, None] - 1
        return masked.sparse_attention(
            query, state.keys, state.values, self.pattern, last, state.positions, call.scale, call.dropout
        )

    def _attend_positions(
        self, state: KeyValueState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> torch.Tensor:
        index = torch.arange(query.shape[2], device=query.device)
        positions = state.num_tokens[:, None] + index  # [B, T]
        new = positions if call.lengths is None else positions.masked_fill(index >= call.lengths[:, None], -1)
        compute = reference.sparse_attention if self.backend() == "reference" else masked.sparse_attention
        return compute(
            query,
            torch.cat((state.keys, key), dim=2),
            torch.cat((state.values, value), dim=2),
            self.pattern,
            positions,
            torch.cat((state.positions, new), dim=1),
            call.scale,
            call.dropout,
        )
