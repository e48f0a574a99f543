"""Sparse attention: softmax over the keys a pattern shows, and a store that keeps no more than the pattern needs."""

from __future__ import annotations

import torch

from ..cache import KeyValueState, KeyValueStore
from ..config import SparseConfig
from ..ops.sparse import banded, by_dimension, choose_backend, flex, gathered, masked, reference, single
from ..ops.sparse.jobs import Places
from ..patterns import Pattern
from .base import MECHANISMS, Mechanism
from .call import Call
from .geometry import HeadGeometry


@MECHANISMS.register("sparse")
class SparseAttention(Mechanism):
    """Softmax attention under a pattern (see `hf_effattn.patterns`), without learned parameters.

    Args:
        config: The pattern and the backend.
        geometry: Heads and head dimension of the layer.
        pattern: What the heads see; None for the pattern of the config.
    """

    options: SparseConfig

    def __init__(self, config: SparseConfig, geometry: HeadGeometry, pattern: Pattern | None = None) -> None:
        super().__init__(config, geometry)
        self.pattern = pattern or resolve_for(config, geometry)
        self.store = KeyValueStore(self.pattern.retention)

    @property
    def heads_are_alike(self) -> bool:
        pattern = self.pattern
        if pattern.num_heads is not None or not (pattern.parts or pattern.is_windowed):  # others may be anything
            return False
        return all(part.by_head is None for part in pattern.parts)

    def attend(
        self, state: KeyValueState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, KeyValueState]:
        state = self.store.empty(key, value) if state is None else self.store.matching(state, key)
        backend = self.backend(query.device.type)
        if query.shape[2] == 1 and backend != "reference":
            state = self.store.append(state, key, value, call.lengths, call.in_place)
            whole = call.in_place and self._sees_slots and self._is_whole(state)
            if whole and by_dimension.is_wanted(query, state.keys):
                state = state._replace(keys=by_dimension.stored(state.keys))  # once: further steps write into them
            if self._reads_seen_alone(state, backend, call):
                return self._attend_seen(state, query, call), state
            return self._attend_one(state, query, call), state
        if backend == "gathered" and state.most and self._goes_behind(state, call):
            return self._attend_behind(state, query, key, value, call)
        if backend == "banded":
            output = self._attend_band(state, query, key, value, call)
        elif backend in ("gathered", "flex") and not self._needs_masks(call):
            output = self._attend_places(state, query, key, value, call)
        else:
            output = self._attend_positions(state, query, key, value, call)
        return output, self.store.append(state, key, value, call.lengths) if call.keep_state else state

    def advance(
        self, state: KeyValueState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> KeyValueState:
        state = self.store.empty(key, value) if state is None else self.store.matching(state, key)
        return self.store.append(state, key, value, call.lengths)

    def fixed(self, state: KeyValueState, max_length: int) -> KeyValueState:
        return self.store.fixed(state, max_length)

    def num_visible(self, context_length: int) -> int:
        return self.pattern.num_visible(context_length - 1)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g = self.geometry
        return self.store.nbytes(context_length, g.num_kv_heads, g.head_dim, g.value_dim, dtype)

    def flops_per_token(self, context_length: int) -> int:
        return self.geometry.softmax_flops(self.num_visible(context_length))

    def backend(self, device: str = "cpu") -> str:
        return choose_backend(self.pattern, self.options.backend, device)

    def describe(self) -> str:
        return f"sparse {self.pattern.describe()}"

    def _attend_one(self, state: KeyValueState, query: torch.Tensor, call: Call) -> torch.Tensor:
        """Attend with one query, the last token of `state`, to whatever slots it sees."""
        if self._sees_slots and self._is_filled(state):
            keys, values = state.keys, state.values
            if keys.shape[2] > state.most:
                keys, values = keys[:, :, : state.most], values[:, :, : state.most]
            if by_dimension.is_stored(keys) and not call.dropout:
                return by_dimension.attend(query, keys, values, call.scale)
            return masked.attend(query, keys, values, None, call.scale, call.dropout)
        last = state.num_tokens[:, None] - 1
        return masked.sparse_attention(
            query, state.keys, state.values, self.pattern, last, state.positions, call.scale, call.dropout
        )

    def _reads_seen_alone(self, state: KeyValueState, backend: str, call: Call) -> bool:
        """Whether a single query should read the keys it sees and no others: where each is in the slot of its position,
        and they are many."""
        if self.store.window is not None or backend != "gathered" or call.dropout or torch.compiler.is_compiling():
            return False
        return self.options.backend == "gathered" or state.keys.shape[2] >= single.LEAST_SLOTS

    def _attend_seen(self, state: KeyValueState, query: torch.Tensor, call: Call) -> torch.Tensor:
        """Attend with one query, the last token of `state`, to the keys it sees."""
        outputs = []
        for row, number in _alike_rows(state):
            tensors = (query[row], state.keys[row], state.values[row])
            outputs.append(single.sparse_attention(*tensors, self.pattern, max(number - 1, 0), call.scale))
        return torch.cat(outputs)

    @property
    def _sees_slots(self) -> bool:
        """Whether the last token sees whatever is kept."""
        return bool(self.pattern.band) and self.store.window != 1

    def _is_filled(self, state: KeyValueState) -> bool:
        """Whether the first `state.most` slots of every row, as far as there are so many, hold a token."""
        return state.least == state.most or self._is_whole(state)

    def _is_whole(self, state: KeyValueState) -> bool:
        """Whether the ring of every row is full, and stays so."""
        return self.store.window is not None and state.least - self.store.num_leading >= self.store.window

    def _attend_band(
        self, state: KeyValueState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> torch.Tensor:
        assert self.pattern.band is not None
        window = self.pattern.band.window
        stream = self.store.stream(state, key, value, state.most if window is None else window - 1)
        return banded.sparse_attention(query, stream, self.pattern.band, call.scale, call.dropout)

    def _needs_masks(self, call: Call) -> bool:
        """Whether the gathered backend cannot do what is asked: drop weights, or be traced by the compiler."""
        if self.options.backend in ("gathered", "flex") and call.dropout:
            raise ValueError(
                f"backend {self.options.backend!r} has no attention dropout; use 'auto', or set attention_dropout to 0"
            )
        return self.options.backend == "auto" and (call.dropout > 0 or torch.compiler.is_compiling())

    def _goes_behind(self, state: KeyValueState, call: Call) -> bool:
        """Whether several tokens can be written behind all others, each into the slot of its position."""
        plain = call.may_fill and call.lengths is None and not self._needs_masks(call)
        return plain and self.store.has_no_ring(state)

    def _attend_behind(
        self, state: KeyValueState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, KeyValueState]:
        """Attend with several tokens over a state that keeps every key, which is not copied."""
        places = Places(state.most)
        state = self.store.append(state, key, value, in_place=call.in_place, may_fill=True)
        return gathered.sparse_attention(query, state.keys, state.values, self.pattern, places, call.scale), state

    def _attend_places(
        self, state: KeyValueState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """Attend where all rows have the same past; else row by row."""
        chosen = self.backend(query.device.type)
        compute = flex.sparse_attention if chosen == "flex" else gathered.sparse_attention
        if state.most == 0:
            return compute(query, key, value, self.pattern, Places(), call.scale)
        keys, values = torch.cat((state.keys, key), dim=2), torch.cat((state.values, value), dim=2)
        index = torch.arange(query.shape[2], device=query.device)
        outputs = []
        for row, first in _alike_rows(state):
            places = Places.of(first, torch.cat((state.positions[row][0], first + index)))
            outputs.append(compute(query[row], keys[row], values[row], self.pattern, places, call.scale))
        return torch.cat(outputs)

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


def _alike_rows(state: KeyValueState) -> list[tuple[slice, int]]:
    """Return rows that can be computed at once, and how many tokens they have seen: all where all have seen as many."""
    if state.least == state.most:
        return [(slice(None), state.most)]
    return [(slice(row, row + 1), number) for row, number in enumerate(state.num_tokens.tolist())]


def resolve_for(config: SparseConfig, geometry: HeadGeometry) -> Pattern:
    """Return the pattern of `config` for all query heads; what it says of key/value heads holds for the query heads
    that share them.

    Raises:
        ValueError: if it is for another number of heads.
    """
    pattern = config.resolve()
    if pattern.num_heads in (None, geometry.num_heads):
        return pattern
    if pattern.num_heads != geometry.num_kv_heads or pattern.for_heads is None:
        raise ValueError(
            f"{pattern.describe()} is for {pattern.num_heads} heads; the layer has {geometry.num_heads} query heads "
            f"and {geometry.num_kv_heads} key/value heads"
        )
    share = geometry.num_heads // geometry.num_kv_heads
    return pattern.for_heads([head for head in range(geometry.num_kv_heads) for _ in range(share)])
