"""The state of linear attention and the pair an operation returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...notation import state_dtype

EPS = 1e-6  # the least denominator: a query without any similar key gets (almost) zero, never a division by zero


class LinearState(NamedTuple):
    """What linear attention remembers of the past; its size doesn't depend on how much past there was.

    Args:
        sums: `Σ φ(k) [v, 1]ᵀ` `[B, G, F, V+1]`, float32 (float64 for a float64 model): one tensor, so that one
            operation advances it and one reads it.
    """

    sums: torch.Tensor

    @property
    def kv(self) -> torch.Tensor:
        """`Σ φ(k) vᵀ` `[B, G, F, V]`."""
        return self.sums[..., :-1]

    @property
    def normalizer(self) -> torch.Tensor:
        """`Σ φ(k)` `[B, G, F]`."""
        return self.sums[..., -1]

    @classmethod
    def of(cls, kv: torch.Tensor, normalizer: torch.Tensor) -> LinearState:
        """Return the state with these parts."""
        return cls(torch.cat((kv, normalizer[..., None]), dim=-1))


class LinearOutput(NamedTuple):
    """The output `[B, H, T, V]` in the dtype of the query, and the state after the last token."""

    output: torch.Tensor
    state: LinearState


def empty_state(batch: int, num_heads: int, feature_dim: int, value_dim: int, like: torch.Tensor) -> LinearState:
    """Return the state of an empty past for `num_heads` key/value heads, on the device of `like`."""
    shape = (batch, num_heads, feature_dim, value_dim + 1)
    return LinearState(torch.zeros(shape, dtype=state_dtype(like.dtype), device=like.device))
