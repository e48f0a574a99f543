"""The Hedgehog feature map."""

from __future__ import annotations

import torch
from torch import nn

from .base import FEATURE_MAPS, FeatureMap
from .projection import by_head


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(FeatureMap):
    """`φ(x) = [softmax(Wx), softmax(−Wx)]`, W learned per head, F = 2D (Zhang 2024, arXiv 2402.04347).

    The softmax runs over the features, never over tokens. W starts as the identity and has no bias.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__(head_dim, num_heads)
        self.feature_dim = 2 * head_dim
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))  # [H, D, D]
        self.reset_parameters()

    @property
    def flops_per_token(self) -> int:
        return 2 * self.head_dim**2 + 5 * self.feature_dim

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return by_head(x, self.weight)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat((x, -x), dim=-1).unflatten(-1, (2, self.head_dim))  # one softmax for both is faster
        return both.softmax(dim=-1).flatten(-2)  # [B, H, T, F]

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.head_dim).expand_as(self.weight))
