"""How features come from queries and keys: part of every call of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ...feature_maps import FeatureMap
from ...recurrences import Gates, Recurrence
from .state import EPS

Arrange = Callable[[torch.Tensor], torch.Tensor]


class Plan(NamedTuple):
    """Feature maps, what they need to know, and which keys there are.

    Args:
        query_map: φ for queries; None if they are features already.
        key_map: φ for keys, likewise.
        chunk: Tokens of one chunk of the parallel form.
        query_at: Positions of the queries `[B or 1, T]`, for maps that use them.
        key_at: Positions of the keys, likewise.
        real: Which keys there are `[B or 1, T]`, booleans; None for all.
        recurrence: How the state goes from token to token; None for a plain sum.
    """

    query_map: FeatureMap | None = None
    key_map: FeatureMap | None = None
    chunk: int = 64
    query_at: torch.Tensor | None = None
    key_at: torch.Tensor | None = None
    real: torch.Tensor | None = None
    recurrence: Recurrence | None = None

    def queries(self, x: torch.Tensor, arrange: Arrange | None = None) -> torch.Tensor:
        """Map queries `[B, H, T, D]` to features, rearranged in between as marks of this plan already are."""
        return self._unit(_features(x, self.query_map, self.query_at, arrange))

    def keys(self, x: torch.Tensor, arrange: Arrange | None = None) -> torch.Tensor:
        """Map keys `[B, G, T, D]` to features, zero where there is no key."""
        x = x if self.recurrence is None else self.recurrence.without_gates(x)
        x = self._unit(_features(x, self.key_map, self.key_at, arrange))
        return x if self.real is None else x * self.real[:, None, :, None].to(x.dtype)

    def gates(self, x: torch.Tensor, arrange: Arrange | None = None) -> Gates:
        """Return the gates of keys `[B, G, T, ·]`: where there is no key, there is no decay."""
        if self.recurrence is None:
            return Gates()
        decay, strength = self.recurrence(x)
        if arrange is not None:
            decay, strength = (None if gate is None else arrange(gate) for gate in (decay, strength))
        if decay is not None and self.real is not None:
            decay = decay * self.real[:, None, :, None].to(decay.dtype)
        return Gates(decay, strength)

    def output(self, sums: torch.Tensor, least: float = EPS) -> torch.Tensor:
        """Return the output `[·, G, R·C, V]` of what queries read from the state, `[·, G, R·C, V+1]`.

        Args:
            least: A denominator counts as at least this much.
        """
        if self.is_delta:
            assert self.recurrence is not None
            return self.recurrence.output(sums[..., :-1])
        return sums[..., :-1] / sums[..., -1:].clamp(min=least)

    @property
    def is_delta(self) -> bool:
        return self.recurrence is not None and self.recurrence.delta

    def _unit(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the recurrence wants them: those of a delta rule have length 1, and are float32."""
        if not self.is_delta:
            return features
        return functional.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)

    def feature_dim(self, key: torch.Tensor) -> int:
        if self.key_map is not None:
            return self.key_map.feature_dim
        return (key if self.recurrence is None else self.recurrence.without_gates(key)).shape[-1]

    def part(self, start: int, end: int) -> Plan:
        """Return the plan of tokens `start..end` alone."""
        query_at, key_at, real = (
            None if x is None else x[:, start:end] for x in (self.query_at, self.key_at, self.real)
        )
        return self._replace(query_at=query_at, key_at=key_at, real=real)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Both maps and the recurrence, as far as there are any."""
        return tuple(m for m in (self.query_map, self.key_map, self.recurrence) if m is not None)


def _features(
    x: torch.Tensor, feature_map: FeatureMap | None, at: torch.Tensor | None, arrange: Arrange | None
) -> torch.Tensor:
    if feature_map is not None:
        return feature_map(x, at, arrange)
    return x if arrange is None else arrange(x)
