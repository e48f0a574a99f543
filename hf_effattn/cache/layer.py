"""The cache layer of converted attention: a container of state that transformers' `Cache` can hold and handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

State = Any  # a (nested) NamedTuple of tensors [B, ...] and ints, whatever the mechanism needs


class Pending(NamedTuple):
    """Tokens that can still be taken back: not in the state yet.

    Args:
        key, value: `[B, G, T, ·]`.
        padding_mask: `[B, T]`, True = keep, or None if all are real.
        query: `[B, H, T, D]`, for mechanisms whose state depends on queries; else None.
    """

    key: torch.Tensor
    value: torch.Tensor
    padding_mask: torch.Tensor | None
    query: torch.Tensor | None = None

    def part(self, end: int) -> Pending:
        """Return the first `end` tokens."""
        key, value, mask, query = self
        cut_mask, cut_query = None if mask is None else mask[:, :end], None if query is None else query[:, :, :end]
        return Pending(key[:, :, :end], value[:, :, :end], cut_mask, cut_query)


class EffAttnCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """What a converted layer remembers of the text: all of its state, and nothing on the module.

    The layer never computes: the mechanism reads `state` and hands back the state after the new tokens. `update`, which
    the model calls, only counts tokens. While the past is recorded (`activate_past_recording`, as assisted decoding
    does), new tokens wait in `pending` until `crop` says which of them stay, so rollback is exact.
    """

    is_compileable = False
    # transformers sizes the masks of softmax layers by the first cache layer whose `is_sliding` equals False (for those
    # with a window, True), and some versions of it by the first for which it is false: this is neither.
    is_sliding: Any = "neither"
    beside: Any = None  # a softmax layer of the same cache, if there is one
    max_length: int | None = None  # tokens a static cache makes room for
    supports_early_init = False
    is_croppable = True

    def __init__(self, **_: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.record_past = False
        self.owner: str | None = None
        self.state: State = None
        self.pending: Pending | None = None
        self.confirmed = False
        self.num_seen = 0
        self.num_announced = 0
        self.is_bound = False

    def bind(self, owner: str) -> None:
        """Announce a call of the layer described by `owner`; a cache filled by another kind of layer is refused."""
        if self.owner is not None and self.owner != owner and self.num_seen:
            raise ValueError(
                f"this cache was filled by a layer with {self.owner}; the model's layer now has {owner}. "
                "Start with a new cache after converting or reverting."
            )
        self.owner = owner
        self.is_bound = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Count the new tokens and return their keys and values as they are."""
        if not self.is_bound:
            raise ValueError(
                f"this cache was made for converted attention ({self.owner or 'hf_effattn'}) and cannot serve a layer "
                "that is not converted. Start with a new cache after reverting."
            )
        self.is_bound = False
        self.num_announced = key_states.shape[2]
        self.num_seen += self.num_announced
        self.has_previous_state[0] = True  # models with recurrent layers of their own may ask any layer for it
        return key_states, value_states

    def claim(self, num_tokens: int) -> None:
        """Check that the tokens to attend to are those announced by `update`, once."""
        if num_tokens != self.num_announced:
            raise ValueError(
                f"the model announced {self.num_announced} tokens to its cache and attends with {num_tokens}: "
                "attention that runs twice a layer or shares keys between layers is not supported"
            )
        self.num_announced = 0

    def past(self, advance: Callable[[State, Pending, bool], State]) -> State:
        """Return the state before the new tokens.

        Args:
            advance: `(state, tokens, is_last) -> state`, of the mechanism; may overwrite the state that it is given if
                nothing else will go on from it.
        """
        if self.pending is None:
            return self.state
        is_last = self.confirmed or not self.record_past
        state = advance(self.state, self.pending, is_last)
        if is_last:
            self.state, self.pending, self.confirmed = state, None, False
        return state

    def ingest(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take over S tokens that were not attended to here: what a softmax layer left, or a learned prefix. The next
        call advances the state over them.

        Args:
            key: `[B, G, S, D]`; value `[B, G, S, V]`, all of real tokens.
        """
        self.pending, self.confirmed = Pending(key, value, None), True
        self.num_seen, self.is_initialized = key.shape[2], True

    def commit(self, state: State, tokens: Pending) -> None:
        """Take the state after the new `tokens`; while the past is recorded, keep the tokens aside instead."""
        self.is_initialized = True
        if not self.record_past:
            self.state = state
        elif self.pending is None:
            self.pending = tokens
        else:
            self.pending = _joined(self.pending, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens exactly; the others that were pending are confirmed.

        Args:
            tokens_to_remove: Minus their number (as transformers counts), or 0.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, or 0; got {tokens_to_remove}")
        number = -tokens_to_remove
        held = 0 if self.pending is None else self.pending.key.shape[2]
        if number > held or (number and self.confirmed):
            raise RuntimeError(
                f"cannot take back {number} tokens: {0 if self.confirmed else held} are still recorded. Call "
                "activate_past_recording() before the tokens come; a constant-size state cannot be rolled back after."
            )
        if self.pending is None:
            return
        keep = held - number
        self.pending = self.pending.part(keep)
        self.num_seen -= number
        self.confirmed = True
        if not keep:
            self.pending, self.confirmed = None, False

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        leaves = pytree.tree_leaves((self.state, self.pending))
        return sum(leaf.untyped_storage().nbytes() for leaf in leaves if isinstance(leaf, torch.Tensor))

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks for converted layers cover the new tokens only; beside softmax layers they get the masks of these."""
        if self.beside is not None:
            return self.beside.get_mask_sizes(query_length)
        return query_length, self.num_seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.pending, self.confirmed = None, None, False
        self.num_seen, self.num_announced, self.is_bound = 0, 0, False
        self.has_previous_state[0] = False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Nothing to do: the state is about to be read, and where it is of constant size it is small."""

    def prefetch(self) -> None:
        """Nothing to do: the state was not offloaded."""

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the mechanism makes the state when the first tokens come."""

    def update_conv_state(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("converted attention has no convolution state")

    def update_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("the state of converted attention is advanced by its mechanism")

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.state, self.pending = pytree.tree_map_only(torch.Tensor, change, (self.state, self.pending))


def _joined(first: Pending, second: Pending) -> Pending:
    mask = None
    if first.padding_mask is not None or second.padding_mask is not None:
        parts = [
            p.key.new_ones(p.key.shape[0], p.key.shape[2], dtype=torch.bool)
            if p.padding_mask is None
            else p.padding_mask
            for p in (first, second)
        ]
        mask = torch.cat(parts, dim=1)
    query = None
    if first.query is not None and second.query is not None:
        query = torch.cat((first.query, second.query), dim=2)
    key, value = torch.cat((first.key, second.key), dim=2), torch.cat((first.value, second.value), dim=2)
    return Pending(key, value, mask, query)
