"""Feature maps of linear attention, found by name in `FEATURE_MAPS`. A new one is a file and a name in this import."""

from . import cosformer, dpfp, elu, hedgehog, performer, rebased, relu, softmax, t2r, taylor  # noqa: F401
from .base import FEATURE_MAPS, FeatureMap, map_options

__all__ = ["FEATURE_MAPS", "FeatureMap", "map_options"]
