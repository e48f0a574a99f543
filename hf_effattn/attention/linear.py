"""Linear attention: a recurrent state of constant size in place of a KV cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..config import LinearConfig
from ..feature_maps import FEATURE_MAPS
from ..notation import may_overwrite
from ..ops.linear import LinearState, Plan, empty_state, linear_attention, recurrent, triton
from ..recurrences import RECURRENCES, Recurrence, RecurrenceShape
from .base import MECHANISMS, Mechanism
from .call import Call
from .geometry import HeadGeometry


class CountedState(NamedTuple):
    """The state of linear attention whose feature map uses positions.

    Args:
        linear: What all tokens left.
        num_tokens: Real tokens each row has seen `[B]`, int64.
        most: A bound of `num_tokens` over the rows, known without asking the device.
    """

    linear: LinearState
    num_tokens: torch.Tensor
    most: int


@MECHANISMS.register("linear")
class LinearAttention(Mechanism):
    """Linear attention with feature map φ (Katharopoulos 2020, arXiv 2006.16236): no key is kept.

    Learned parameters: those of the feature maps of queries (per query head) and keys (per key/value head), and of the
    recurrence.

    Args:
        config: Feature map, recurrence, chunk size, backend.
        geometry: Heads and head dimension of the layer.
    """

    options: LinearConfig

    def __init__(self, config: LinearConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        feature_map = FEATURE_MAPS.get(config.feature_map)
        self.query_map = feature_map(geometry.head_dim, geometry.num_heads, **config.map_options)
        self.key_map = feature_map(geometry.head_dim, geometry.num_kv_heads, **config.map_options)
        self.recurrence: Recurrence | None = None
        if config.recurrence != "sum":
            g, features = geometry, self.key_map.feature_dim
            shape = RecurrenceShape(g.num_heads, g.num_kv_heads, g.head_dim, features, g.hidden_size)
            self.recurrence = RECURRENCES.get(config.recurrence)(shape)
            self.num_gates = self.recurrence.num_gates
        self.before_rotary = self.key_map.before_rotary or (
            self.recurrence is not None and self.recurrence.before_rotary
        )

    @property
    def heads_are_alike(self) -> bool:
        return self.recurrence is None

    def read_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.recurrence is not None
        return self.recurrence.read_hidden(hidden)

    def attend(
        self, state: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, Any]:
        if not self.key_map.uses_positions:
            linear = self._empty(key, value) if state is None else state
            return self._attend_linear(linear, query, key, value, call, None)
        if state is None:
            state = CountedState(self._empty(key, value), key.new_zeros(key.shape[0], dtype=torch.int64), 0)
        tokens = query.shape[2]
        self._check_length(state.most + tokens)
        positions = state.num_tokens[:, None] + torch.arange(tokens, device=query.device)  # [B, T]
        output, linear = self._attend_linear(state.linear, query, key, value, call, positions)
        added = tokens if call.lengths is None else call.lengths
        return output, CountedState(linear, state.num_tokens + added, state.most + tokens)

    def fixed(self, state: Any, max_length: int) -> Any:
        return state._replace(most=max_length - 1) if isinstance(state, CountedState) else state

    def num_visible(self, context_length: int) -> int:
        return 0

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        return self._state_bytes() + (torch.int64.itemsize if self.key_map.uses_positions else 0)

    def flops_per_token(self, context_length: int) -> int:
        g = self.geometry
        heads = g.num_heads + g.num_kv_heads
        maps = g.num_heads * self.query_map.flops_per_token + g.num_kv_heads * self.key_map.flops_per_token
        softmax = g.softmax_flops(self.num_visible(context_length))
        gates = 0 if self.recurrence is None else self.recurrence.flops_per_token
        return 2 * heads * self.key_map.feature_dim * (g.value_dim + 1) + maps + gates + softmax

    def backend(self, device: str = "cpu") -> str:
        return "chunked" if self.options.backend == "auto" else self.options.backend

    def describe(self) -> str:
        c = self.options
        recurrence = "" if c.recurrence == "sum" else f" {c.recurrence}"
        return f"linear {c.feature_map}{recurrence}(window={c.window}, num_sinks={c.num_sinks})"

    def _state_bytes(self) -> int:
        g = self.geometry
        return g.num_kv_heads * self.key_map.feature_dim * (g.value_dim + 1) * torch.float32.itemsize

    def _empty(self, key: torch.Tensor, value: torch.Tensor) -> LinearState:
        return empty_state(key.shape[0], key.shape[1], self.key_map.feature_dim, value.shape[-1], like=key)

    def _check_length(self, most: int) -> None:
        limit = self.key_map.max_position
        if limit is not None and most > limit:
            raise ValueError(
                f"feature map {self.options.feature_map!r} places tokens up to max_position={limit}; this text has up "
                f"to {most}. Convert with a larger max_position"
            )

    def _attend_linear(
        self,
        state: LinearState,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, LinearState]:
        mask = None
        if call.lengths is not None:
            mask = torch.arange(query.shape[2], device=query.device) < call.lengths[:, None]
        if query.shape[2] == 1 and self.options.backend != "reference":
            plan = Plan(self.query_map, self.key_map, 1, positions, positions, mask, self.recurrence)
            in_place = call.in_place and may_overwrite(state.sums)
            compute = triton.linear_attention if self.options.backend == "triton" else recurrent.linear_attention
            return compute(query, key, value, state, plan, in_place)
        return linear_attention(
            query,
            key,
            value,
            state=state,
            padding_mask=mask,
            query_map=self.query_map,
            key_map=self.key_map,
            positions=positions,
            recurrence=self.recurrence,
            chunk_size=self.options.chunk_size,
            backend=self.options.backend,
        )
