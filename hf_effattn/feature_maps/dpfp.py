"""The DPFP feature map."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("dpfp")
class DPFP(FeatureMap):
    """`φ(x) = [r ∘ roll(r, 1), …, r ∘ roll(r, ν)]` with `r = relu([x, −x])`, F = 2Dν: the deterministic parameter-free
    projection of Schlag 2021 (arXiv 2102.11174).

    Args:
        head_dim: D.
        num_heads: Heads this instance sees.
        nu: ν, how many rolls; F grows with it.
    """

    def __init__(self, head_dim: int, num_heads: int, nu: int = 3) -> None:
        super().__init__(head_dim, num_heads)
        self.nu = whole_number("nu", nu, 1)
        if self.nu >= 2 * head_dim:
            raise ValueError(f"nu must be less than twice the head dimension, {2 * head_dim}; got {nu}")
        self.feature_dim = 2 * head_dim * self.nu

    @property
    def flops_per_token(self) -> int:
        return 2 * self.head_dim + self.feature_dim

    def features(self, x: torch.Tensor) -> torch.Tensor:
        r = torch.cat((x, -x), dim=-1).relu()
        return torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, self.nu + 1)], dim=-1)
