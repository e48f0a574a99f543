"""Which keys a cache of limited capacity gives up, found by name in `EVICTIONS`. A new one is a file and a name in this
import."""

from . import expected_attention, h2o, knorm, snapkv, tova  # noqa: F401
from .base import EVICTIONS, Eviction, Evidence

__all__ = ["EVICTIONS", "Eviction", "Evidence"]
