"""A store of keys and values that keeps what a `Retention` asks for, and no more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ..notation import may_overwrite
from ..ops.stream import Stream
from ..patterns.retention import in_columns
from .slots import Slots


class KeyValueState(NamedTuple):
    """The contents of a store.

    Args:
        keys, values: `[B, G, S, D]`, `[B, G, S, V]`, in the dtype they came in.
        positions: Position held by each slot `[B, S]`, int64; −1 for an empty one.
        num_tokens: Real tokens each row has seen `[B]`, int64: the position of its next token.
        least, most: Bounds of `num_tokens` over the rows, known without asking the device; loose ones are only slower.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    num_tokens: torch.Tensor
    least: int
    most: int


class KeyValueStore(Slots):
    """How a store is made and goes on from token to token. It has no state of its own.

    Args:
        retention: What to keep.
    """

    def empty(self, key: torch.Tensor, value: torch.Tensor) -> KeyValueState:
        """Return the state before the first token, for keys and values like these."""
        batch = key.shape[0]
        positions = torch.zeros(batch, 0, dtype=torch.int64, device=key.device)
        return KeyValueState(key[:, :, :0], value[:, :, :0], positions, positions.new_zeros(batch), 0, 0)

    def matching(self, state: KeyValueState, key: torch.Tensor) -> KeyValueState:
        """Return `state` in the dtype of `key`, which autocast may have changed since."""
        if state.keys.dtype == key.dtype:
            return state
        return state._replace(keys=state.keys.to(key.dtype), values=state.values.to(key.dtype))

    def append(
        self,
        state: KeyValueState,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor | None = None,
        in_place: bool = False,
        may_fill: bool = False,
    ) -> KeyValueState:
        """Return the state after the tokens key `[B, G, T, D]`, value `[B, G, T, V]`.

        Args:
            lengths: Real tokens of each row `[B]`, which come first; None for T.
            in_place: Whether the tensors of `state` may be overwritten.
            may_fill: Whether at least its empty slots may be: then `state` stays as it is, but a state that came of it
                in this way before does not.
        """
        tokens = key.shape[2]
        if (in_place or may_fill) and lengths is None and all(map(may_overwrite, state[:3])):
            if tokens == 1 and in_place:
                return self._append_one(state, key, value)
            if self.has_no_ring(state):
                return self._append_behind(state, key, value, in_place)
        added = key.new_full((key.shape[0],), tokens, dtype=torch.int64) if lengths is None else lengths
        num_tokens = state.num_tokens + added
        least = state.least
        if lengths is None:
            least += tokens
        elif not torch.compiler.is_compiling():  # a lower bound all the same, and no question to the device
            least += int(lengths.min())
        state = self._grown(state, self.num_slots(state.most + tokens))
        wanted = self._held(num_tokens, state.keys.shape[2])  # [B, S]
        source = wanted - state.num_tokens[:, None]
        is_new = source >= 0
        index = source.clamp(0, tokens - 1)[:, None, :, None]
        keys, values = (
            torch.where(is_new[:, None, :, None], _gather(x, index), old)
            for x, old in ((key, state.keys), (value, state.values))
        )
        return KeyValueState(keys, values, wanted, num_tokens, least, state.most + tokens)

    def fixed(self, state: KeyValueState, max_length: int) -> KeyValueState:
        """Return `state` with every slot that `max_length` tokens need, and bounds that no step moves."""
        slots = self.num_slots(max_length)
        state = self._grown(state, slots)
        keys, values = state.keys[:, :, :slots], state.values[:, :, :slots]
        return state._replace(
            keys=keys, values=values, positions=state.positions[:, :slots], least=0, most=max_length - 1
        )

    def leaving(
        self, state: KeyValueState, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Return key and value `[B, G, 1, ·]` of what the next token of each row will overwrite, and in which rows it
        will overwrite something `[B]` (None: in all). None altogether if it is known that nothing will be.

        Args:
            lengths: Whether a row gets a token at all, 0 or 1 `[B]`; None for one in every row.
        """
        if self.window is None or state.most - self.window < self.num_leading:
            return None
        if state.least == state.most and lengths is None:
            slot = self._ring_slot(state.most)
            return state.keys[:, :, slot : slot + 1], state.values[:, :, slot : slot + 1], None
        slots = self._ring_slot(state.num_tokens).clamp(max=state.keys.shape[2] - 1)
        index = slots[:, None, None, None]
        valid = state.num_tokens - self.window >= self.num_leading
        if lengths is not None:
            valid = valid & (lengths > 0)
        return _gather(state.keys, index), _gather(state.values, index), valid

    def stream(self, state: KeyValueState, key: torch.Tensor, value: torch.Tensor, width: int) -> Stream:
        """Return the last `width` positions, then the new tokens, as a stream in order of positions.

        Only for stores whose pinned positions are the first tokens, and `width` at most their window.
        """
        if not state.most:
            return Stream(key, value)
        order = state.num_tokens[:, None] - width + torch.arange(width, device=key.device)  # [B, width]
        slots = torch.where(order < self.num_leading, order, self._ring_slot(order))
        index = slots.clamp(0, state.keys.shape[2] - 1)[:, None, :, None]
        sink_key, sink_value = self._leading(state, key, value)
        return Stream(
            torch.cat((_gather(state.keys, index), key), dim=2),
            torch.cat((_gather(state.values, index), value), dim=2),
            state.num_tokens - width,
            state.least - width,
            sink_key,
            sink_value,
        )

    def nbytes(self, num_tokens: int, num_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of the state of one row after `num_tokens` tokens."""
        slots = self.num_slots(num_tokens)
        return slots * (num_heads * (key_dim + value_dim) * dtype.itemsize + 8) + 8

    def has_no_ring(self, state: KeyValueState) -> bool:
        """Whether all is kept, each position in its own slot, and all rows are as long."""
        return self.window is None and state.least == state.most

    def _leading(
        self, state: KeyValueState, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `num_leading` tokens of each row, from the state or, where they come now, from the new tokens."""
        number = self.num_leading
        if state.least >= number:
            return state.keys[:, :, :number], state.values[:, :, :number]
        position = torch.arange(number, device=key.device).expand(key.shape[0], -1)
        new = position - state.num_tokens[:, None]
        index = torch.where(new < 0, position, number + new.clamp(0, key.shape[2] - 1))[:, None, :, None]
        old = (state.keys[:, :, :number], state.values[:, :, :number])
        sink_key, sink_value = (
            _gather(torch.cat((o, x), dim=2), index) for o, x in zip(old, (key, value), strict=True)
        )
        return sink_key, sink_value

    def _grown(self, state: KeyValueState, slots: int) -> KeyValueState:
        missing = slots - state.keys.shape[2]
        if missing <= 0:
            return state
        keys, values = (functional.pad(x, (0, 0, 0, missing)) for x in (state.keys, state.values))
        positions = functional.pad(state.positions, (0, missing), value=-1)
        return state._replace(keys=keys, values=values, positions=positions)

    def _append_behind(
        self, state: KeyValueState, key: torch.Tensor, value: torch.Tensor, in_place: bool
    ) -> KeyValueState:
        """Append tokens behind all others, without a copy of these (but where storage grows)."""
        start, end = state.most, state.most + key.shape[2]
        state = self._grown(state, self.num_slots(end))
        positions = state.positions if in_place else state.positions.clone()
        state.keys[:, :, start:end].copy_(key)
        state.values[:, :, start:end].copy_(value)
        positions[:, start:end] = torch.arange(start, end, device=positions.device)
        return KeyValueState(state.keys, state.values, positions, state.num_tokens + key.shape[2], end, end)

    def _append_one(self, state: KeyValueState, key: torch.Tensor, value: torch.Tensor) -> KeyValueState:
        state = self._grown(state, self.num_slots(state.most + 1))
        if state.least == state.most and state.least > self._last_pinned:
            slot = self._ring_slot(state.most)
            if self.columns is not None and in_columns(state.most, *self.columns):
                state.positions.select(1, slot).fill_(-1)  # what it would take the place of is gone all the same
                slot = self._column_slot(state.most)
            state.keys.select(2, slot).copy_(key.select(2, 0))  # an assignment by index takes twice the time
            state.values.select(2, slot).copy_(value.select(2, 0))
            state.positions.select(1, slot).fill_(state.most)
        else:
            slots = self._slots(state.num_tokens)[:, None]  # [B, 1]
            for old, new in ((state.keys, key), (state.values, value)):
                old.scatter_(2, slots[:, None, :, None].expand_as(new), new)
            if self.columns is not None:
                at = state.num_tokens
                replaced = torch.where(in_columns(at, *self.columns), self._ring_slot(at), slots[:, 0])
                state.positions.scatter_(1, replaced[:, None], -1)
            state.positions.scatter_(1, slots, state.num_tokens[:, None])
        counts = (state.num_tokens + 1, state.least + 1, state.most + 1)
        return KeyValueState(state.keys, state.values, state.positions, *counts)  # `_replace` takes three times as long


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take slots `index` `[B, 1, S', 1]` of x `[B, G, S, X]`."""
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
