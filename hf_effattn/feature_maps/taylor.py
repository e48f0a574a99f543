"""The Taylor feature map."""

from __future__ import annotations

import torch
from torch import nn

from ..notation import whole_number
from .base import FEATURE_MAPS, FeatureMap
from .projection import by_head, orthogonal_rows, triangle_products


@FEATURE_MAPS.register("taylor")
class Taylor(FeatureMap):
    """`φ(x) = [1, y/X^{1/4}, vec(yyᵀ)/√(2X)]` with `y = W x`, W learned per head, so that `φ(q)·φ(k) = 1 + s + s²/2`,
    the Taylor series of `exp(s)` for `s = y_q·y_k/√X` (Based; Arora 2024, arXiv 2402.18668).

    The symmetric `yyᵀ` is kept as its triangle: F = 1 + X + X(X+1)/2. W starts with orthogonal rows, the same in all
    heads, of such a length that s is `q·k/√D` where the projection loses nothing.

    Args:
        head_dim: D.
        num_heads: Heads this instance sees.
        projection_dim: X, the size of the projected queries and keys; default 16, at most D.
    """

    def __init__(self, head_dim: int, num_heads: int, projection_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads)
        self.rows = min(16, head_dim) if projection_dim is None else whole_number("projection_dim", projection_dim, 1)
        self.feature_dim = 1 + self.rows + self.rows * (self.rows + 1) // 2
        self.weight = nn.Parameter(torch.empty(num_heads, self.rows, head_dim))  # [H, X, D]
        self.reset_parameters()

    @property
    def flops_per_token(self) -> int:
        return 2 * self.head_dim * self.rows + 2 * self.feature_dim

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return by_head(x, self.weight)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.rows**-0.25
        return torch.cat((torch.ones_like(y[..., :1]), y, triangle_products(y) * 0.5**0.5), dim=-1)

    def reset_parameters(self) -> None:
        start = orthogonal_rows(self.rows, self.head_dim) * (self.rows / self.head_dim) ** 0.25
        with torch.no_grad():
            self.weight.copy_(start.expand_as(self.weight))
