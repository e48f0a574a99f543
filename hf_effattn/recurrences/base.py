"""What a recurrence is, and the registry of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ..registry import Registry

LEAST = -5.0  # a decay to less than 1 % in one token counts as that: exponents within a chunk stay small
RECURRENCES: Registry[type[Recurrence]] = Registry("recurrence")


class Recurrence(nn.Module):
    """How the state of linear attention goes from one token to the next: `S_t = α_t ∘ S_{t-1} + φ(k_t) [v_t, 1]ᵀ`.

    The decay α belongs to a key/value head, and either to the head as a whole or to each of its features. Numerator and
    denominator decay together: the output stays a weighted mean of values, and with α = 1 nothing changes.

    Args:
        head_dim: D, the size of the keys.
        num_heads: G, key/value heads.
        feature_dim: F, the size of the features.
    """

    before_rotary: ClassVar[bool] = False  # whether decays come from keys as they were before rotary
    per_feature: ClassVar[bool] = False  # whether each feature has a decay of its own

    def __init__(self, head_dim: int, num_heads: int, feature_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.feature_dim = feature_dim

    def log_decay(self, key: torch.Tensor) -> torch.Tensor:
        """Return `log α` `[B, G, T, 1 or F]`, float32 and at most 0, for keys `[B, G, T, D]` in float32."""
        raise NotImplementedError

    def forward(self, key: torch.Tensor) -> torch.Tensor:
        """Return `log α` for keys `[B, G, T, D]` of any dtype, or `[B, G, T, 2D]` with those before rotary behind."""
        part = key[..., -self.head_dim :] if self.before_rotary else key[..., : self.head_dim]
        decay = self.log_decay(part if part.dtype == torch.float64 else part.float())
        return decay.clamp(min=LEAST)

    def reset_parameters(self) -> None:
        """Set learned parameters to their documented start."""
