"""What a recurrence is, and the registry of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ..notation import rotary_half
from ..registry import Registry

# A decay to less than 1 % in one token counts as that, and chunks with decays of each feature are short: so the
# exponents within a chunk, up to half of it away from its middle, stay within float32.
LEAST = -5.0
PER_FEATURE_CHUNK = 16
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
        part = rotary_half(key, self.head_dim, self.before_rotary)
        decay = self.log_decay(part if part.dtype == torch.float64 else part.float())
        return decay.clamp(min=LEAST)

    def chunk_size(self, wanted: int) -> int:
        """Return how many tokens a chunk may have."""
        return min(wanted, PER_FEATURE_CHUNK) if self.per_feature else wanted

    def reset_parameters(self) -> None:
        """Set learned parameters to their documented start."""
