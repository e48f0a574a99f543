"""Feature maps of linear attention, found by name in `FEATURE_MAPS`. A new one is a file and an import line here."""

from . import elu, hedgehog, relu
from .base import FEATURE_MAPS, FeatureMap

__all__ = ["FEATURE_MAPS", "FeatureMap", "elu", "hedgehog", "relu"]
