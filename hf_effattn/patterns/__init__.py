"""Sparse patterns: factories of index predicates, composable by `|` and `&`, found by name in `PATTERNS`."""

from .base import PATTERNS, Band, Pattern, Retention, make_pattern, pattern_from_spec
from .dilated import dilated
from .fixed import fixed
from .global_tokens import global_tokens
from .presets import streaming
from .sinks import sinks
from .sliding_window import sliding_window
from .strided import strided

__all__ = [
    "PATTERNS",
    "Band",
    "Pattern",
    "Retention",
    "dilated",
    "fixed",
    "global_tokens",
    "make_pattern",
    "pattern_from_spec",
    "sinks",
    "sliding_window",
    "streaming",
    "strided",
]
