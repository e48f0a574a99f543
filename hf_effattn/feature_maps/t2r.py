"""The T2R feature map."""

from __future__ import annotations

import torch
from torch import nn

from ..notation import whole_number
from .base import FEATURE_MAPS, FeatureMap
from .projection import by_head, orthogonal_rows


@FEATURE_MAPS.register("t2r")
class T2R(FeatureMap):
    """`φ(x) = relu(W x + b)`, W and b learned per head (Transformer-to-RNN; Kasai 2021, arXiv 2103.13076).

    W starts as the identity, or with orthogonal rows if F is not D; b starts at 0.

    Args:
        head_dim: D.
        num_heads: Heads this instance sees.
        feature_dim: F; default D.
    """

    def __init__(self, head_dim: int, num_heads: int, feature_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads)
        if feature_dim is not None:
            self.feature_dim = whole_number("feature_dim", feature_dim, 1)
        self.weight = nn.Parameter(torch.empty(num_heads, self.feature_dim, head_dim))  # [H, F, D]
        self.bias = nn.Parameter(torch.empty(num_heads, 1, self.feature_dim))  # [H, 1, F]
        self.reset_parameters()

    @property
    def flops_per_token(self) -> int:
        return 2 * self.head_dim * self.feature_dim + 2 * self.feature_dim

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return by_head(x, self.weight)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.bias.to(x.dtype)).relu()

    def reset_parameters(self) -> None:
        square = self.feature_dim == self.head_dim
        start = torch.eye(self.head_dim) if square else orthogonal_rows(self.feature_dim, self.head_dim)
        with torch.no_grad():
            self.weight.copy_(start.expand_as(self.weight))
            self.bias.zero_()
