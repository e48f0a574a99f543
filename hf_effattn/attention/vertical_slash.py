"""Sparse attention over columns and diagonals of the attention matrix that earlier queries voted for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..cache import KeyValueState, KeyValueStore
from ..config import SparseConfig
from ..ops import lines
from ..ops.lines import Lines
from ..ops.sparse import masked
from ..patterns import Retention
from ..selectors import VerticalSlash
from .base import MECHANISMS, Mechanism
from .call import Call
from .geometry import HeadGeometry


class VerticalSlashState(NamedTuple):
    """All keys and values, the last queries, and what queries of the current stretch see.

    Args:
        store: Keys and values; a token's slot is its position.
        voters: The last W queries `[B, H, W, D]`; that at position t in place `t mod W`.
        columns: `[B, G, C]`; bands: `[B, G, N]` (see `hf_effattn.ops.lines`).
    """

    store: KeyValueState
    voters: torch.Tensor
    columns: torch.Tensor
    bands: torch.Tensor

    @property
    def lines(self) -> Lines:
        return Lines(self.columns, self.bands)


@MECHANISMS.register("vertical_slash")
class VerticalSlashAttention(Mechanism):
    """Softmax attention over what queries of one stretch voted for those of the next
    (see `hf_effattn.selectors.vertical_slash`); nothing is learned.

    Args:
        config: Numbers of columns and diagonals, length of a stretch.
        geometry: Heads and head dimension of the layer.
    """

    options: SparseConfig
    needs_queries = True

    def __init__(self, config: SparseConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        self.selector = VerticalSlash(**config.selection())
        self.store = KeyValueStore(Retention())

    def attend(
        self,
        state: VerticalSlashState | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, VerticalSlashState]:
        tokens, size = query.shape[2], self.selector.block_size
        state = self._empty(query, key, value) if state is None else self._matching(state, query)
        old = state.store
        if not old.most and tokens <= size and not call.keep_state:
            return masked.attend_causal(query, key, value, call.scale, call.dropout), state
        store = self.store.append(old, key, value, call.lengths, call.in_place, call.may_fill)
        if tokens == 1:
            output, chosen = self._attend_one(state, query, store, call)
            return output, self._joined(store, [chosen])
        together = old.least == old.most and call.lengths is None
        rows = [slice(None)] if together else [slice(b, b + 1) for b in range(query.shape[0])]
        outputs, states = [], []
        for row in rows:
            output, chosen = self._attend_row(state, row, query, store, call)
            outputs.append(output)
            states.append(chosen)
        return torch.cat(outputs) if len(rows) > 1 else outputs[0], self._joined(store, states)

    def num_visible(self, context_length: int) -> int:
        s = self.selector
        own = (context_length - 1) % s.block_size + 1
        return own + min(context_length - own, s.num_columns + s.num_bands * s.width)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g, s = self.geometry, self.selector
        voters = g.num_heads * s.width * g.head_dim * dtype.itemsize
        chosen = g.num_kv_heads * (s.num_columns + s.num_bands) * torch.int64.itemsize
        keys = self.store.nbytes(context_length, g.num_kv_heads, g.head_dim, g.value_dim, dtype)
        return keys + voters + chosen

    def flops_per_token(self, context_length: int) -> int:
        g = self.geometry
        votes = 2 * g.num_heads * g.head_dim * context_length * self.selector.width // self.selector.block_size
        return votes + g.softmax_flops(self.num_visible(context_length))

    def backend(self, device: str = "cpu") -> str:
        return "gathered"

    def describe(self) -> str:
        return f"sparse vertical_slash({', '.join(f'{k}={v}' for k, v in self.options.selection().items())})"

    def _empty(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> VerticalSlashState:
        batch, groups, s = key.shape[0], key.shape[1], self.selector
        voters = query.new_zeros(batch, query.shape[1], s.width, query.shape[3])
        columns, bands = (
            torch.full((batch, groups, number), -1, device=key.device) for number in (s.num_columns, s.num_bands)
        )
        return VerticalSlashState(self.store.empty(key, value), voters, columns, bands)

    def _matching(self, state: VerticalSlashState, query: torch.Tensor) -> VerticalSlashState:
        """Return `state` in the dtype of `query`, which autocast may have changed since."""
        return state._replace(store=self.store.matching(state.store, query), voters=state.voters.to(query.dtype))

    def _attend_row(
        self,
        state: VerticalSlashState,
        row: slice,
        query: torch.Tensor,
        store: KeyValueState,
        call: Call,
    ) -> tuple[torch.Tensor, VerticalSlashState]:
        """Attend with rows of one past and one length, stretch by stretch."""
        s, size = self.selector, self.selector.block_size
        voters, chosen = state.voters[row], Lines(state.columns[row], state.bands[row])
        past = int(state.store.num_tokens[row][0]) if state.store.least != state.store.most else state.store.most
        length = query.shape[2] if call.lengths is None else int(call.lengths[row][0])
        outputs, place = [], past
        while place < past + length:
            start = place - place % size
            end = min(start + size, past + length)
            if start == place and start:
                chosen = Lines(*s.vote(voters, store.keys[row, :, :start], call.scale))
            part = query[row, :, place - past : end - past]
            keys, values = store.keys[row], store.values[row]
            if end <= size and not past:
                keys, values = keys[:, :, :end], values[:, :, :end]
                output = masked.attend_causal(part, keys, values, call.scale, call.dropout)
            else:
                first, begin = (state.voters.new_full((part.shape[0],), x, dtype=torch.int64) for x in (place, start))
                output = lines.attend(
                    part, keys, values, first, begin, chosen, s.width, end - start, call.scale, call.dropout
                )
            outputs.append(output)
            slots = torch.arange(max(place, end - s.width), end, device=query.device)
            voters = voters.index_copy(2, slots % s.width, part[:, :, slots - place].detach())
            place = end
        missing = query.shape[2] - length
        if missing:
            outputs.append(query.new_zeros(*query[row].shape[:2], missing, store.values.shape[3]))
        return torch.cat(outputs, dim=2), VerticalSlashState(store, voters, *chosen)

    def _attend_one(
        self, state: VerticalSlashState, query: torch.Tensor, store: KeyValueState, call: Call
    ) -> tuple[torch.Tensor, VerticalSlashState]:
        """Attend with one query in each row, whatever their pasts."""
        s, size, old = self.selector, self.selector.block_size, state.store
        chosen, place = state.lines, old.num_tokens
        if old.least == old.most:
            due = [slice(None)] if old.most % size == 0 and old.most else []
        else:
            due = [slice(b, b + 1) for b, number in enumerate(place.tolist()) if number % size == 0 and number]
        for row in due:
            past = int(place[row][0]) if old.least != old.most else old.most
            voted = s.vote(state.voters[row], store.keys[row, :, :past], call.scale)
            chosen = Lines(*(_replaced(old, row, new) for old, new in zip(chosen, voted, strict=True)))
        longest = min(size, old.most + 1)
        output = lines.attend(
            query,
            store.keys,
            store.values,
            place,
            place - place % size,
            chosen,
            s.width,
            longest,
            call.scale,
            call.dropout,
        )
        slot = (place % s.width)[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
        new = query.detach()
        if call.lengths is not None:
            new = torch.where((call.lengths > 0)[:, None, None, None], new, state.voters.gather(2, slot))
        return output, VerticalSlashState(store, state.voters.scatter(2, slot, new), *chosen)

    @staticmethod
    def _joined(store: KeyValueState, rows: list[VerticalSlashState]) -> VerticalSlashState:
        parts = zip(*((row.voters, row.columns, row.bands) for row in rows), strict=True)
        return VerticalSlashState(store, *(torch.cat(part) if len(part) > 1 else part[0] for part in parts))


def _replaced(old: torch.Tensor, row: slice, new: torch.Tensor) -> torch.Tensor:
    if row == slice(None):
        return new
    return torch.cat((old[: row.start], new, old[row.stop :]))
