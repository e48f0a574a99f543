"""What a feature map is, and the registry of them."""

from __future__ import annotations

import torch
from torch import nn

from ..registry import Registry

FEATURE_MAPS: Registry[type[FeatureMap]] = Registry("feature map")


class FeatureMap(nn.Module):
    """φ: maps each query or key of a head to non-negative features whose dot product imitates `exp(q·k/√D)`.

    Queries and keys have an instance each. Maps are applied after rotary, in float32, token by token, so that nothing
    depends on other tokens or on the length of the text.

    Args:
        head_dim: D, the size of the queries and keys.
        num_heads: Heads this instance sees (H for queries, G for keys); learned maps have parameters per head.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = num_heads

    @property
    def feature_dim(self) -> int:
        """F, the number of features."""
        return self.head_dim

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations that one head needs for one token (multiply and add count as two)."""
        return 2 * self.head_dim

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (or float64) x `[B,H,T,D]` to its features `[B,H,T,F]`."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x `[B,H,T,D]` to `[B,H,T,F]` in the dtype of x; computed in at least float32."""
        wide = x if x.dtype == torch.float64 else x.float()
        return self.features(wide).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set learned parameters to their documented start (maps without parameters have nothing to do)."""
