"""The Performer feature map."""

from __future__ import annotations

import math

import torch

from ..notation import whole_number
from .base import FEATURE_MAPS, FeatureMap
from .projection import orthogonal_rows, row_lengths

FLOOR = 1e-4  # added to every feature, as in the paper's code: no key is forgotten altogether
MOST = 30.0  # exponents are cut here: sums of products of such features over any text stay within float32


@FEATURE_MAPS.register("performer")
class Performer(FeatureMap):
    """`φ(x) = (exp(w_i·x' − ‖x'‖²/2) + 1e-4) / √F` with `x' = x / D^{1/4}` (FAVOR+; Choromanski 2021,
    arXiv 2009.14794), so that `φ(q)·φ(k)` estimates `exp(q·k/√D)`.

    The directions `w_i` are orthogonal in blocks of D, with the lengths of normal vectors. They are a buffer, the same
    in all layers and heads, and never drawn again. The paper's stabiliser looks at all keys of the text, also future
    ones; here exponents are cut at 30 instead, which only directions much longer than usual reach.

    Args:
        head_dim: D.
        num_heads: Heads this instance sees.
        feature_dim: F; default `D ln D`, at least D.
    """

    directions: torch.Tensor

    def __init__(self, head_dim: int, num_heads: int, feature_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads)
        default = max(head_dim, int(head_dim * math.log(head_dim)))
        self.feature_dim = default if feature_dim is None else whole_number("feature_dim", feature_dim, 1)
        self.register_buffer("directions", torch.empty(self.feature_dim, head_dim))  # [F, D]
        self.reset_parameters()

    @property
    def flops_per_token(self) -> int:
        return 2 * self.head_dim * self.feature_dim + 4 * self.feature_dim

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.head_dim**-0.25
        exponents = torch.matmul(x, self.directions.to(x.dtype).T) - x.square().sum(-1, keepdim=True) / 2
        return (exponents.clamp(max=MOST).exp() + FLOOR) * self.feature_dim**-0.5

    def reset_parameters(self) -> None:
        lengths = row_lengths(self.feature_dim, self.head_dim)
        with torch.no_grad():
            self.directions.copy_(orthogonal_rows(self.feature_dim, self.head_dim) * lengths[:, None])
