"""Sparse attention over blocks that each query selects by content, from all keys and a summary of each block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ..cache import KeyValueState, KeyValueStore
from ..config import SparseConfig
from ..notation import may_overwrite
from ..ops.selected import Selection, choose_backend, selected_attention, step
from ..ops.sparse.masked import attend, attend_causal
from ..patterns import Retention
from ..selectors import SELECTORS, BlockSelector
from .base import MECHANISMS, Mechanism
from .call import Call
from .geometry import HeadGeometry

FEW = 4  # as many keys, over all there are, may queries select that are computed one by one


class SelectedState(NamedTuple):
    """All keys and values, and what the selector knows of each block of them.

    Args:
        store: Keys and values; a token's slot is its position.
        summary: `[B, G, N, P, D]`, float32.
    """

    store: KeyValueState
    summary: torch.Tensor


@MECHANISMS.register("selected")
class SelectedAttention(Mechanism):
    """Softmax attention over the blocks that each query selects (see `hf_effattn.selectors`); nothing is learned.

    Args:
        config: Selector, block size, number of blocks, backend.
        geometry: Heads and head dimension of the layer.
    """

    options: SparseConfig

    def __init__(self, config: SparseConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        assert config.selector is not None
        selector = SELECTORS.get(config.selector)()
        assert isinstance(selector, BlockSelector)
        self.selector = selector
        chosen = config.selection()
        self.block_size, self.num_blocks = chosen["block_size"], chosen["num_blocks"]
        self.store = KeyValueStore(Retention())

    def attend(
        self, state: SelectedState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, SelectedState]:
        tokens = query.shape[2]
        positions = torch.arange(tokens, device=query.device)[None]
        if state is not None:
            positions = positions + state.store.num_tokens[:, None]
        state = self.advance(state, query, key, value, call)
        if self._sees_all(state.store, tokens):
            keys, values = (x[:, :, : state.store.most] for x in (state.store.keys, state.store.values))
            if tokens > 1:
                return attend_causal(query, keys, values, call.scale), state
            return attend(query, keys, values, None, call.scale), state
        past = (state.store.keys, state.store.values, state.summary)
        selection = self.selection(call.scale)
        if self.options.backend == "reference" or not self._are_few(query, state.store):
            return selected_attention(query, *past, positions, selection, backend=self.options.backend), state
        each = zip(query.split(1, dim=2), positions.split(1, dim=1), strict=True)
        outputs = [step(q, *past, at, selection) for q, at in each]
        return outputs[0] if tokens == 1 else torch.cat(outputs, dim=2), state

    def _are_few(self, query: torch.Tensor, store: KeyValueState) -> bool:
        """Whether queries are fastest one by one, each with the blocks it selects."""
        tokens = query.shape[2]
        plain = self.options.backend == "auto" and query.device.type == "cpu" and not torch.compiler.is_compiling()
        return tokens == 1 or (plain and tokens * self.num_blocks * self.block_size <= FEW * store.most)

    def _sees_all(self, store: KeyValueState, tokens: int) -> bool:
        """Whether the store holds no more blocks than a query selects, and its queries are the last token of each row,
        or all tokens from the first on: dense attention then."""
        if self.options.backend == "reference" or store.most > self.num_blocks * self.block_size:
            return False
        return store.least == store.most if tokens == 1 else store.most == tokens

    def selection(self, scale: float) -> Selection:
        """Return how blocks are selected under this factor of the scores."""
        return Selection(self.selector, self.block_size, self.num_blocks, scale)

    def advance(
        self, state: SelectedState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> SelectedState:
        if state is None:
            empty = self.store.empty(key, value)
            state = SelectedState(empty, self._summary(empty))
        before = self.store.matching(state.store, key)
        store = self.store.append(before, key, value, call.lengths, call.in_place, call.may_fill)
        if key.shape[2] == 1:
            return SelectedState(store, self._extended(state.summary, before, store, key, call))
        first = before.least // self.block_size  # blocks before it have got nothing new
        return SelectedState(store, torch.cat((state.summary[:, :, :first], self._summary(store, first)), dim=2))

    def fixed(self, state: SelectedState, max_length: int) -> SelectedState:
        store = self.store.fixed(state.store, max_length)
        return SelectedState(store, self._grown(state.summary, store.keys.shape[2]))

    def num_visible(self, context_length: int) -> int:
        return min(context_length, self.num_blocks * self.block_size)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g = self.geometry
        blocks = self.store.num_slots(context_length) // self.block_size
        summary = g.num_kv_heads * blocks * self.selector.num_vectors * g.head_dim * torch.float32.itemsize
        return summary + self.store.nbytes(context_length, g.num_kv_heads, g.head_dim, g.value_dim, dtype)

    def flops_per_token(self, context_length: int) -> int:
        g = self.geometry
        blocks = -(-context_length // self.block_size)
        scores = 2 * g.num_heads * blocks * self.selector.num_vectors * g.head_dim
        return scores + g.softmax_flops(self.num_visible(context_length))

    def backend(self, device: str = "cpu") -> str:
        return choose_backend(self.options.backend, device)

    def describe(self) -> str:
        return f"sparse {self.options.selector}(block_size={self.block_size}, num_blocks={self.num_blocks})"

    def _summary(self, store: KeyValueState, first: int = 0) -> torch.Tensor:
        """Summaries of the blocks of the store from `first` on, the one that is not full included."""
        keys = store.keys.detach().unflatten(2, (-1, self.block_size))[:, :, first:]
        real = store.positions.unflatten(1, (-1, self.block_size))[:, None, first:, :, None] >= 0
        return self.selector.summary(keys, real)

    def _extended(
        self, summary: torch.Tensor, before: KeyValueState, store: KeyValueState, key: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """Summaries after one more token in every row, or in those that get one."""
        summary = self._grown(summary, store.keys.shape[2])
        if not (call.in_place and may_overwrite(summary)):
            summary = summary.clone()
        key = key.detach()[:, :, 0]
        if before.least == before.most and call.lengths is None:
            block, place = divmod(before.most, self.block_size)
            summary[:, :, block] = self.selector.extended(summary[:, :, block], key, place == 0)
            return summary
        index = (before.num_tokens // self.block_size)[:, None, None, None, None]
        index = index.expand(-1, summary.shape[1], 1, *summary.shape[3:])
        first = (before.num_tokens % self.block_size == 0)[:, None, None, None]
        old = summary.gather(2, index)[:, :, 0]
        new = self.selector.extended(old, key, first)
        if call.lengths is not None:
            new = torch.where((call.lengths > 0)[:, None, None, None], new, old)
        return summary.scatter_(2, index, new[:, :, None])

    def _grown(self, summary: torch.Tensor, slots: int) -> torch.Tensor:
        missing = slots // self.block_size - summary.shape[2]
        return functional.pad(summary, (0, 0, 0, 0, 0, missing)) if missing > 0 else summary
