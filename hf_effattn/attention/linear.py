"""Linear attention: a recurrent state of constant size, optionally behind a softmax window with sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..cache import KeyValueState, KeyValueStore
from ..config import LinearConfig
from ..feature_maps import FEATURE_MAPS
from ..notation import may_overwrite
from ..ops.hybrid import JOINS, HybridOptions, hybrid_attention
from ..ops.hybrid import step as hybrid_step
from ..ops.linear import PER_FEATURE_CHUNK, LinearState, Plan, empty_state, linear_attention, recurrent
from ..patterns import Retention
from ..recurrences import RECURRENCES, Recurrence
from .base import MECHANISMS, Call, HeadGeometry, Mechanism


class HybridState(NamedTuple):
    """The state of linear attention with a window: `linear` has what left the window, `window` what is in it."""

    linear: LinearState
    window: KeyValueState

    @property
    def most(self) -> int:
        return self.window.most


class CountedState(NamedTuple):
    """The state of linear attention without a window whose feature map uses positions.

    Args:
        linear: What all tokens left.
        num_tokens: Real tokens each row has seen `[B]`, int64.
        most: A bound of `num_tokens` over the rows, known without asking the device.
    """

    linear: LinearState
    num_tokens: torch.Tensor
    most: int


State = LinearState | HybridState | CountedState


@MECHANISMS.register("linear")
class LinearAttention(Mechanism):
    """Linear attention with feature map φ (Katharopoulos 2020, arXiv 2006.16236), by default behind a softmax window
    under one normaliser (after LoLCATs, arXiv 2410.10254; see `hf_effattn.ops.hybrid`).

    Learned parameters: those of the feature maps of queries (per query head) and keys (per key/value head), and with
    a window the `bias` `[H]` that opens or closes the linear part (see `hf_effattn.ops.hybrid.JOINS`).

    Args:
        config: Feature map, window, sinks, chunk size, backend.
        geometry: Heads and head dimension of the layer.
    """

    options: LinearConfig
    bias: nn.Parameter | None

    def __init__(self, config: LinearConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        self.num_sinks = config.num_sinks or 0
        feature_map = FEATURE_MAPS.get(config.feature_map)
        self.query_map = feature_map(geometry.head_dim, geometry.num_heads, **config.map_options)
        self.key_map = feature_map(geometry.head_dim, geometry.num_kv_heads, **config.map_options)
        self.recurrence: Recurrence | None = None
        self.chunk_size = config.chunk_size
        if config.recurrence != "sum":
            make = RECURRENCES.get(config.recurrence)
            self.recurrence = make(geometry.head_dim, geometry.num_kv_heads, self.key_map.feature_dim)
            self.chunk_size = min(config.chunk_size, PER_FEATURE_CHUNK) if make.per_feature else config.chunk_size
        self.before_rotary = self.key_map.before_rotary or (
            self.recurrence is not None and self.recurrence.before_rotary
        )
        self.store = KeyValueStore(Retention(config.window, frozenset(range(self.num_sinks))))
        self.bias = nn.Parameter(torch.full((geometry.num_heads,), JOINS[config.join])) if config.window else None

    def attend(
        self,
        state: State | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, State]:
        state = self._empty(key, value) if state is None else state
        if isinstance(state, LinearState):
            return self._attend_linear(state, query, key, value, call, None)
        self._check_length(state.most + key.shape[2])
        if isinstance(state, CountedState):
            return self._attend_counted(state, query, key, value, call)
        state = state._replace(window=self.store.matching(state.window, key))
        if query.shape[2] == 1 and self.backend() != "reference":
            return self._attend_one(state, query, key, value, call)
        return self._attend_hybrid(state, query, key, value, call)

    def fixed(self, state: State, max_length: int) -> State:
        if isinstance(state, LinearState):
            return state
        if isinstance(state, CountedState):
            return state._replace(most=max_length - 1)
        return state._replace(window=self.store.fixed(state.window, max_length))

    def num_visible(self, context_length: int) -> int:
        return min(context_length, self.options.window + self.num_sinks)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g, features = self.geometry, self.key_map.feature_dim
        linear = g.num_kv_heads * features * (g.value_dim + 1) * torch.float32.itemsize
        if not self.options.window:
            return linear + (torch.int64.itemsize if self.key_map.uses_positions else 0)
        return linear + self.store.nbytes(context_length, g.num_kv_heads, self._width, g.value_dim, dtype)

    def flops_per_token(self, context_length: int) -> int:
        g = self.geometry
        heads = g.num_heads + g.num_kv_heads
        maps = g.num_heads * self.query_map.flops_per_token + g.num_kv_heads * self.key_map.flops_per_token
        softmax = g.softmax_flops(self.num_visible(context_length))
        return 2 * heads * self.key_map.feature_dim * (g.value_dim + 1) + maps + softmax

    def backend(self) -> str:
        return "chunked" if self.options.backend == "auto" else self.options.backend

    def describe(self) -> str:
        c = self.options
        recurrence = "" if c.recurrence == "sum" else f" {c.recurrence}"
        return f"linear {c.feature_map}{recurrence}(window={c.window}, num_sinks={self.num_sinks})"

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.constant_(self.bias, JOINS[self.options.join])

    def _options(self, call: Call) -> HybridOptions:
        assert self.bias is not None
        c = self.options
        return HybridOptions(
            self.query_map,
            self.key_map,
            self.bias,
            c.window,
            self.num_sinks,
            call.scale,
            self.chunk_size,
            c.join,
            self.recurrence,
        )

    @property
    def _width(self) -> int:
        """Size of the last dimension of queries and keys."""
        return self.geometry.head_dim * (2 if self.before_rotary else 1)

    def _empty(self, key: torch.Tensor, value: torch.Tensor) -> State:
        linear = empty_state(key.shape[0], key.shape[1], self.key_map.feature_dim, value.shape[-1], like=key)
        if self.options.window:
            return HybridState(linear, self.store.empty(key, value))
        if self.key_map.uses_positions:
            return CountedState(linear, torch.zeros(key.shape[0], dtype=torch.int64, device=key.device), 0)
        return linear

    def _check_length(self, most: int) -> None:
        limit = self.key_map.max_position
        if limit is not None and most > limit:
            raise ValueError(
                f"feature map {self.options.feature_map!r} places tokens up to max_position={limit}; this text has up "
                f"to {most}. Convert with a larger max_position"
            )

    def _positions(self, window: KeyValueState, offset: int) -> torch.Tensor | None:
        """Position `offset` after the next token's of each row `[B, 1]`, if the feature map uses positions."""
        return window.num_tokens[:, None] + offset if self.key_map.uses_positions else None

    def _attend_counted(
        self, state: CountedState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, CountedState]:
        tokens = query.shape[2]
        positions = state.num_tokens[:, None] + torch.arange(tokens, device=query.device)  # [B, T]
        output, linear = self._attend_linear(state.linear, query, key, value, call, positions)
        added = tokens if call.lengths is None else call.lengths
        return output, CountedState(linear, state.num_tokens + added, state.most + tokens)

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
            features, decay = plan.keys(key), plan.log_decay(key)
            return recurrent.attend_one(plan.queries(query), features, value, state, in_place, decay)
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
            chunk_size=self.chunk_size,
            backend=self.options.backend,
        )

    def _attend_hybrid(
        self, state: HybridState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, HybridState]:
        stream = self.store.stream(state.window, key, value, self.options.window)
        output, linear = hybrid_attention(
            query, stream, state.linear, self._options(call), lengths=call.lengths, backend=self.backend()
        )
        if torch.is_grad_enabled() and state.window.most == 0 and query.shape[2] <= self.options.window:
            # Nothing has reached the linear part. Its parameters still get a gradient, zero, since training in several
            # processes waits for one from each of them.
            output = output + sum(0.0 * p.sum() for p in self.parameters() if p.requires_grad)
        window = self.store.append(state.window, key, value, call.lengths) if call.keep_state else state.window
        return output, HybridState(linear, window)

    def _attend_one(
        self, state: HybridState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, HybridState]:
        """Attend with one token: the key that leaves the window enters the linear state, then the token is read."""
        linear = state.linear
        leaving = self.store.leaving(state.window, call.lengths)
        if leaving is not None:
            old_key, old_value, valid = leaving
            at = self._positions(state.window, -self.options.window)
            marks = None if valid is None else valid[:, None]
            plan = Plan(None, self.key_map, 1, None, at, marks, self.recurrence)
            in_place = call.in_place and may_overwrite(linear.sums)
            linear = recurrent.step(plan.keys(old_key), old_value, linear, in_place, plan.log_decay(old_key))
        window = self.store.append(state.window, key, value, call.lengths, call.in_place)
        full = window.least - self.store.num_leading >= self.options.window
        visible = None if full else window.positions >= 0
        here = self._positions(window, -1)
        output = hybrid_step(query, window.keys, window.values, visible, linear, self._options(call), here)
        return output, HybridState(linear, window)
