"""Content-based selection of blocks of keys, found by name in `SELECTORS`. A new one is a file and a name in this
import."""

from . import moba, quest  # noqa: F401
from .base import FORCED, SELECTORS, Selector

__all__ = ["FORCED", "SELECTORS", "Selector"]
