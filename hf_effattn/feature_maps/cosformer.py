"""The cosFormer feature map."""

from __future__ import annotations

import math

import torch

from ..notation import whole_number
from .base import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("cosformer")
class CosFormer(FeatureMap):
    """`φ_t(x) = [r cos(πt/2M), r sin(πt/2M)]` with `r = relu(x)`, so that `φ_i(q)·φ_j(k) = r_q·r_k cos(π(i−j)/2M)`:
    near tokens count more than far ones (Qin 2022, arXiv 2202.08791). F = 2D.

    Queries and keys are mapped as they were before rotary, since the cosine places them. M is fixed, not the length of
    the text as in the paper, which would change the past whenever a token comes.

    Args:
        head_dim: D.
        num_heads: Heads this instance sees.
        max_position: M, the distance at which a token counts nothing; longer texts are refused.
    """

    before_rotary = True
    uses_positions = True

    def __init__(self, head_dim: int, num_heads: int, max_position: int = 8192) -> None:
        super().__init__(head_dim, num_heads)
        self.feature_dim = 2 * head_dim
        self.max_position: int = whole_number("max_position", max_position, 1)

    @property
    def flops_per_token(self) -> int:
        return 3 * self.head_dim

    def features_at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = (positions.to(x.dtype) * (math.pi / 2 / self.max_position))[:, None, :, None]  # [B or 1, 1, T, 1]
        r = x.relu()
        return torch.cat((r * angle.cos(), r * angle.sin()), dim=-1)
