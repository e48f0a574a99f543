"""Content-based selection of keys, found by name in `SELECTORS`. A new one is a file and a name in this import."""

from . import moba, quest  # noqa: F401
from .base import SELECTORS, BlockSelector, Selector
from .vertical_slash import VerticalSlash

__all__ = ["SELECTORS", "BlockSelector", "Selector", "VerticalSlash"]
