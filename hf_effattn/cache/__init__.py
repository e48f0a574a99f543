"""Where converted layers remember: pure stores of keys and values, and the layer that transformers' `Cache` holds."""

from .key_value import KeyValueState, KeyValueStore
from .layer import EffAttnCacheLayer, Pending
from .static import StaticEffAttnCacheLayer

__all__ = ["EffAttnCacheLayer", "KeyValueState", "KeyValueStore", "Pending", "StaticEffAttnCacheLayer"]
