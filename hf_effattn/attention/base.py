"""What a mechanism is: the part of an attention layer between its projections, with a state in place of a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..cache import EffAttnCacheLayer, Pending
from ..config import MechanismConfig
from ..ops import ragged
from ..registry import Registry
from .call import Call
from .geometry import HeadGeometry

MECHANISMS: Registry[type[Mechanism]] = Registry("mechanism")


class Mechanism(nn.Module):
    """Attention over queries, keys and values as the model's own layer made them, after rotary.

    A mechanism is a pure function `attend(state, q, k, v) -> (output, state)`. Full forward, chunked prefill and
    decoding all go through it, so they cannot disagree. Its learned parameters, if any, are all that conversion adds to
    a model; its state lives in the cache.

    A mechanism may ask for queries and keys as they were before rotary (`before_rotary`). They then stand behind the
    others in the last dimension, `[..., 2D]`, in all its calls and in its state. Or it may read the layer's input
    (`num_gates`): what it made of it stands behind the keys, `[..., D or 2D, then E]`.

    Args:
        config: The options.
        geometry: Heads and head dimension of the layer.
    """

    before_rotary = False
    num_gates = 0  # E
    rolls = False  # whether it wants queries as they were before rotary, behind the others, and keys as they are
    needs_queries = False  # whether its state depends on queries, too
    _z3_leaf = True  # tells DeepSpeed's ZeRO-3 to gather all of its parameters at once: passes back call parts of it
    undo_rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None  # set where a layer rotates

    def __init__(self, config: MechanismConfig, geometry: HeadGeometry) -> None:
        super().__init__()
        self.options = config  # not `config`: outside code takes a module's `config` for the model's
        self.geometry = geometry
        self.own = geometry  # of the heads that it attends with: of a part of them under tensor parallelism

    @property
    def key_width(self) -> int:
        """Size of the last dimension of keys in `attend` and in states."""
        return self.geometry.head_dim * (2 if self.before_rotary else 1) + self.num_gates

    @property
    def takes_over(self) -> bool:
        """Whether it can go on from a cache that softmax layers filled, which has keys after rotary, and values."""
        return not (self.needs_queries or self.num_gates or (self.before_rotary and self.undo_rotary is not None))

    def attend(
        self, state: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, Any]:
        """Return the output `[B, H, T, V]` and the state after the T tokens.

        Args:
            state: The state before them; None for no past.
            query: `[B, H, T, D]`; key `[B, G, T, D]`; value `[B, G, T, V]`, all of one dtype.
            call: Scale, real tokens of each row, and whether the state may be overwritten.
        """
        raise NotImplementedError

    def advance(self, state: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> Any:
        """Return the state after the T tokens; as `attend`, for mechanisms that need no output for it."""
        return self.attend(state, query, key, value, call)[1]

    @property
    def heads_are_alike(self) -> bool:
        """Whether heads differ in nothing but parameters whose first dimension is that of query or key/value heads."""
        return True

    def check_shares(self, number: int) -> None:
        """Raise a ValueError unless the heads can be shared out in so many equal parts, of neighbours each."""
        if number > 1 and not self.heads_are_alike:
            raise ValueError(
                f"{self.describe()} cannot be shared out by tensor parallelism: its heads may differ in more than "
                "feature maps. Linear attention with recurrence='sum', patterns that are the same for all heads, "
                "selectors and evictions can"
            )
        self.geometry.part(number)

    def share_heads(self, number: int) -> None:
        """From now on attend with one of so many parts of the heads."""
        self.check_shares(number)
        self.own = self.geometry.part(number)

    def read_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the mechanism wants to know of the layer's input `[B, T, ·]`: `[B, G, T, E]`."""
        raise NotImplementedError

    def num_visible(self, context_length: int) -> int:
        """Return how many keys the last of `context_length` tokens meets in softmax attention."""
        raise NotImplementedError

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        """Return the bytes of one row's state after `context_length` tokens of a model of `dtype`."""
        raise NotImplementedError

    def flops_per_token(self, context_length: int) -> int:
        """Return the floating-point operations of one decoding step (projections not counted)."""
        raise NotImplementedError

    def backend(self, device: str = "cpu") -> str:
        """Return the backend that computes a prefill on a device of this type."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return the mechanism and its options in one line."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set learned parameters to their documented start."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        segments: torch.Tensor | None = None,
        cache_layer: EffAttnCacheLayer | None = None,
        dropout: float = 0.0,
        before_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        gates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the output `[B, H, T, V]`.

        Args:
            query: `[B, H, T, D]`; key `[B, G, T, D]`; value `[B, G, T, V]`.
            scale: Factor of the softmax scores.
            segments: `[B, T]`: booleans, True = keep; or integers, 0 for padding and k for the k-th document packed
                into the row. None for one document without padding.
            cache_layer: Where the state lives; None for a call without past and future.
            dropout: Probability with which softmax weights are dropped; linear attention has none.
            before_rotary: Query and key before rotary, for mechanisms that ask for them.
            gates: What `read_hidden` returned, for mechanisms that read the layer's input.
        """
        self.own.check(query, key, value)
        if self.before_rotary:
            assert before_rotary is not None
            query, key = (torch.cat(pair, dim=-1) for pair in zip((query, key), before_rotary, strict=True))
        if self.rolls:
            assert before_rotary is not None
            query = torch.cat((query, before_rotary[0]), dim=-1)
        if self.num_gates:
            assert gates is not None
            key = torch.cat((key, gates.to(key.dtype)), dim=-1)
        keep = cache_layer is not None and not cache_layer.record_past
        may_fill = cache_layer is not None and not torch.is_grad_enabled()
        call = Call(scale, dropout=dropout, in_place=keep and may_fill, may_fill=may_fill, keep_state=keep)
        if cache_layer is not None:
            return self._attend_cached(query, key, value, segments, cache_layer, call)
        if segments is None or _only_trailing_padding(segments):
            return self.attend(None, query, key, value, call)[0]
        if segments.dtype == torch.bool:
            front = ragged.front(segments)
            return front.scatter(
                self.attend(None, front.gather(query), front.gather(key), front.gather(value), call)[0]
            )
        batch, heads, tokens, _ = query.shape
        output = query.new_zeros(batch * tokens, heads, value.shape[-1])
        for rows in ragged.documents(segments):
            part, _ = self.attend(None, rows.gather(query), rows.gather(key), rows.gather(value), call)
            output = rows.scatter(part, output)
        return output.view(batch, tokens, heads, -1).transpose(1, 2)

    def fixed(self, state: Any, max_length: int) -> Any:
        """Return `state` in tensors whose shapes stay the same for texts of up to `max_length` tokens, and without
        numbers that change from call to call: what a static cache holds, so that a compiled step is compiled once.

        Raises:
            ValueError: for mechanisms that have no such state.
        """
        raise ValueError(f"{self.describe()} works with dynamic caches only; leave cache_implementation at its default")

    def _attend_cached(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        cache_layer: EffAttnCacheLayer,
        call: Call,
    ) -> torch.Tensor:
        state = cache_layer.past(lambda state, tokens, is_last: self._advance(state, tokens, is_last, call))
        if mask is None:
            output, state = self.attend(state, query, key, value, call)
        else:
            rows = ragged.front(mask)
            call = call._replace(lengths=rows.lengths)
            output, state = self.attend(state, rows.gather(query), rows.gather(key), rows.gather(value), call)
            output = rows.scatter(output)
        if cache_layer.max_length is not None:
            state = self.fixed(state, cache_layer.max_length)
        cache_layer.commit(state, Pending(key, value, mask, query if self.needs_queries else None))
        return output

    def _advance(self, state: Any, tokens: Pending, is_last: bool, call: Call) -> Any:
        """Return the state after `tokens`, whose outputs were computed before.

        Args:
            is_last: Whether nothing else will go on from `state`.
            call: The one that asks for it.
        """
        key, value, mask, query = tokens
        if self.needs_queries and query is None:
            raise ValueError(
                "the cache was filled by softmax attention or a learned prefix, without the queries that "
                f"{self.describe()} goes by. Start with a new cache after converting"
            )
        if key.shape[3] < self.key_width:  # keys of a softmax layer, or of a prefix
            if not self.takes_over:
                raise ValueError(
                    "the cache was filled by softmax attention or a learned prefix, with keys after rotary only; "
                    f"{self.describe()} needs {'the hidden states' if self.num_gates else 'them before rotary'} too. "
                    "Start with a new cache after converting"
                )
            key = torch.cat((key, key), dim=-1)
        call = Call(call.scale, in_place=is_last and call.may_fill, may_fill=call.may_fill)
        if query is None:
            width = self.geometry.head_dim * (2 if self.before_rotary or self.rolls else 1)
            query = key.new_zeros(key.shape[0], self.own.num_heads, key.shape[2], width)
        if mask is not None:
            rows = ragged.front(mask)
            query, key, value = (rows.gather(x) for x in (query, key, value))
            call = call._replace(lengths=rows.lengths)
        return self.advance(state, query, key, value, call)


def _only_trailing_padding(segments: torch.Tensor) -> bool:
    """Whether each row is one document from its first token on, followed by nothing but padding, as far as can be told
    without breaking a graph that is being compiled."""
    if torch.compiler.is_compiling():
        return False
    one_document = segments[:, :1] * (segments > 0)
    return bool((segments == one_document).all() and (segments[:, 1:] <= segments[:, :-1]).all())
