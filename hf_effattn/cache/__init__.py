"""Where converted layers remember: pure stores of keys and values, the layer that transformers' `Cache` holds, and the
name by which models take a cache."""

from .argument import CACHE_ARGUMENTS, cache_argument, with_cache
from .key_value import KeyValueState, KeyValueStore
from .layer import EffAttnCacheLayer, Pending
from .static import StaticEffAttnCacheLayer

__all__ = [
    "CACHE_ARGUMENTS",
    "EffAttnCacheLayer",
    "KeyValueState",
    "KeyValueStore",
    "Pending",
    "StaticEffAttnCacheLayer",
    "cache_argument",
    "with_cache",
]
