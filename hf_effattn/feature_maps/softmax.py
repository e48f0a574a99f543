"""The softmax feature map."""

from __future__ import annotations

import torch

from .base import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("softmax")
class Softmax(FeatureMap):
    """`φ(x) = softmax(x)` over the D features, no parameters, F = D (as in Liger, Lan 2025, arXiv 2503.01496)."""

    @property
    def flops_per_token(self) -> int:
        return 5 * self.head_dim

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(dim=-1)
