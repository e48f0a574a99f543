"""Linear attention behind a softmax window with sinks: the keys that leave the window enter the linear state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..cache import KeyValueState, KeyValueStore
from ..config import JOINS, LinearConfig
from ..notation import may_overwrite
from ..ops.hybrid import HybridOptions, hybrid_attention, step
from ..ops.linear import LinearState, recurrent
from ..patterns import Retention
from .base import MECHANISMS
from .call import Call
from .geometry import HeadGeometry
from .linear import LinearAttention


class HybridState(NamedTuple):
    """The state of linear attention with a window: `linear` has what left the window, `window` what is in it."""

    linear: LinearState
    window: KeyValueState


@MECHANISMS.register("hybrid")
class HybridAttention(LinearAttention):
    """Softmax over a window and sinks and linear attention over all older keys, under one normaliser (after LoLCATs,
    arXiv 2410.10254; see `hf_effattn.ops.hybrid`).

    Learned beside the parameters of linear attention: `bias` `[H]`, which opens or closes the linear part.

    Args:
        config: Window, sinks, join, and the options of linear attention.
        geometry: Heads and head dimension of the layer.
    """

    def __init__(self, config: LinearConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        self.num_sinks = config.num_sinks or 0
        self.store = KeyValueStore(Retention(config.window, frozenset(range(self.num_sinks))))
        self.bias = nn.Parameter(torch.full((geometry.num_heads,), JOINS[config.join]))

    def attend(
        self, state: HybridState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, HybridState]:
        if state is None:
            state = HybridState(self._empty(key, value), self.store.empty(key, value))
        self._check_length(state.window.most + key.shape[2])
        state = state._replace(window=self.store.matching(state.window, key))
        if query.shape[2] == 1 and self.backend() != "reference":
            return self._attend_one(state, query, key, value, call)
        return self._attend_many(state, query, key, value, call)

    def fixed(self, state: HybridState, max_length: int) -> HybridState:
        return state._replace(window=self.store.fixed(state.window, max_length))

    def num_visible(self, context_length: int) -> int:
        return min(context_length, self.options.window + self.num_sinks)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g = self.geometry
        return self._state_bytes() + self.store.nbytes(
            context_length, g.num_kv_heads, self.key_width, g.value_dim, dtype
        )

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, JOINS[self.options.join])

    def _options(self, call: Call) -> HybridOptions:
        c = self.options
        return HybridOptions(
            self.query_map,
            self.key_map,
            self.bias,
            c.window,
            self.num_sinks,
            call.scale,
            c.chunk_size,
            c.join,
            self.recurrence,
        )

    def _positions(self, window: KeyValueState, offset: int) -> torch.Tensor | None:
        """Position `offset` after the next token's of each row `[B, 1]`, if the feature map uses positions."""
        return window.num_tokens[:, None] + offset if self.key_map.uses_positions else None

    def _attend_many(
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
            plan = self._options(call).plan(key_at=at, real=marks)
            in_place = call.in_place and may_overwrite(linear.sums)
            linear = recurrent.step(plan.keys(old_key), old_value, linear, in_place, plan.gates(old_key))
        window = self.store.append(state.window, key, value, call.lengths, call.in_place)
        full = window.least - self.store.num_leading >= self.options.window
        visible = None if full else window.positions >= 0
        here = self._positions(window, -1)
        output = step(query, window.keys, window.values, visible, linear, self._options(call), here)
        return output, HybridState(linear, window)
