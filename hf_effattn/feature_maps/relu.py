"""The relu feature map."""

from __future__ import annotations

import torch

from .base import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("relu")
class Relu(FeatureMap):
    """`φ(x) = relu(x)`: sparse features, no parameters, F = D (Kasai 2021, arXiv 2103.13076, without its projection).

    A query all of whose products with the past are zero gets the output 0.
    """

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()
