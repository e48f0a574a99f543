"""Facts about model families. A new family is a name in `families.py`; only what differs takes more."""

from . import falcon, families, gptj
from .base import ARCHITECTURES, Architecture
from .families import REFUSED
from .heads import head_counts
from .rotary import find_rotation, find_undo

__all__ = [
    "ARCHITECTURES",
    "REFUSED",
    "Architecture",
    "falcon",
    "families",
    "find_rotation",
    "find_undo",
    "gptj",
    "head_counts",
]
