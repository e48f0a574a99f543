"""The state of linear attention and the pair an operation returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...notation import state_dtype

EPS = 1e-6  # the least denominator: a query without any similar key gets (almost) zero, never a division by zero


class LinearState(NamedTuple):
    """What linear attention remembers of the past; its size doesn't depend on how much past there was.

    Args:
        kv: `Σ φ(k) vᵀ` `[B, G, F, V]`, float32 (float64 for a float64 model).
        normalizer: `Σ φ(k)` `[B, G, F]`, the same dtype.
    """

    kv: torch.Tensor
    normalizer: torch.Tensor


class LinearOutput(NamedTuple):
    """The output `[B, H, T, V]` in the dtype of the query, and the state after the last token."""

    output: torch.Tensor
    state: LinearState


def empty_state(batch: int, num_heads: int, feature_dim: int, value_dim: int, like: torch.Tensor) -> LinearState:
    """Return the state of an empty past for `num_heads` key/value heads, on the device of `like`."""
    kv = torch.zeros(batch, num_heads, feature_dim, value_dim, dtype=state_dtype(like.dtype), device=like.device)
    return LinearState(kv, kv.new_zeros(batch, num_heads, feature_dim))


def joined(state: LinearState) -> torch.Tensor:
    """Return the state with the normalizer as the last column, `[B, G, F, V+1]`."""
    return torch.cat((state.kv, state.normalizer[..., None]), dim=-1)


def split(joined_state: torch.Tensor) -> LinearState:
    """Undo `joined`, into tensors that own their memory: a cache must not hold on to the scratch they came from."""
    return LinearState(joined_state[..., :-1].contiguous(), joined_state[..., -1].contiguous())
