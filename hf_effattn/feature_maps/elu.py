"""The elu feature map."""

from __future__ import annotations

import torch
from torch.nn import functional

from .base import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("elu")
class Elu(FeatureMap):
    """`φ(x) = elu(x) + 1`: positive everywhere, no parameters, F = D (Katharopoulos 2020, arXiv 2006.16236)."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return functional.elu(x) + 1
