"""The ReBased feature map."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..notation import whole_number
from .base import FEATURE_MAPS, FeatureMap
from .projection import by_head, orthogonal_rows, triangle_products


@FEATURE_MAPS.register("rebased")
class ReBased(FeatureMap):
    """`φ(x) = [1, vec(yyᵀ)/√X]` with `y = γ ∘ LN(W x) + β`, W, γ, β learned per head, so that
    `φ(q)·φ(k) = 1 + (y_q·y_k)²/X` (after ReBased; Aksenov 2024, arXiv 2402.10644).

    The symmetric `yyᵀ` is kept as its triangle: F = 1 + X(X+1)/2. The 1 is not in the paper: without it the weights of
    all keys may vanish together, and what rounding leaves of them would be the answer. W starts with orthogonal rows,
    the same in all heads, γ at 1 and β at 0.

    Args:
        head_dim: D.
        num_heads: Heads this instance sees.
        projection_dim: X, the size of the projected queries and keys, at least 2; default 16, at most D.
    """

    def __init__(self, head_dim: int, num_heads: int, projection_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads)
        self.rows = min(16, head_dim) if projection_dim is None else whole_number("projection_dim", projection_dim, 2)
        self.feature_dim = 1 + self.rows * (self.rows + 1) // 2
        self.weight = nn.Parameter(torch.empty(num_heads, self.rows, head_dim))  # [H, X, D]
        self.gain = nn.Parameter(torch.empty(num_heads, 1, self.rows))  # γ [H, 1, X]
        self.shift = nn.Parameter(torch.empty(num_heads, 1, self.rows))  # β [H, 1, X]
        self.reset_parameters()

    @property
    def flops_per_token(self) -> int:
        return 2 * self.head_dim * self.rows + 8 * self.rows + 2 * self.feature_dim

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return by_head(x, self.weight)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.layer_norm(x, (self.rows,))
        y = y * self.gain.to(x.dtype) + self.shift.to(x.dtype)
        return torch.cat((torch.ones_like(y[..., :1]), triangle_products(y) * self.rows**-0.5), dim=-1)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(orthogonal_rows(self.rows, self.head_dim).expand_as(self.weight))
            self.gain.fill_(1.0)
            self.shift.zero_()
