"""The cache layer for compiled decoding: the same state in tensors that never move or change shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .layer import EffAttnCacheLayer, Pending, State


class StaticEffAttnCacheLayer(EffAttnCacheLayer):
    """What `cache_implementation="static"` holds for a converted layer.

    States of constant size take any number of tokens; a pattern that keeps every key has room for `max_cache_len`.

    Args:
        max_cache_len: Tokens to make room for.
    """

    is_compileable = True
    max_length: int

    def __init__(self, max_cache_len: int, **_: Any) -> None:
        super().__init__()
        self.max_length = max_cache_len
        self.buffers: list[torch.Tensor] = []
        self.num_seen: Any = torch.tensor(0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.num_seen = _pinned_down(self.num_seen.to(key_states.device))
        return super().update(key_states, value_states)

    def commit(self, state: State, tokens: Pending) -> None:
        super().commit(state, tokens)
        self._settle()

    def get_seq_length(self) -> Any:
        return self.num_seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        counter = self.num_seen
        super().reset()
        self.num_seen = counter.zero_()

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map(change)
        self._settle()

    def _settle(self) -> None:
        """Move the tensors of the state into the buffers, which are made when the first state comes."""
        leaves, structure = pytree.tree_flatten(self.state)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if [x.shape for x in tensors] != [x.shape for x in self.buffers]:
            self.buffers = [_pinned_down(x.clone(memory_format=torch.contiguous_format)) for x in tensors]
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            if buffer is not tensor:
                buffer.copy_(tensor)
        settled = iter(self.buffers)
        self.state = pytree.tree_unflatten(
            [next(settled) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )


def _pinned_down(x: torch.Tensor) -> torch.Tensor:
    """Tell the compiler that `x` stays where it is."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x
