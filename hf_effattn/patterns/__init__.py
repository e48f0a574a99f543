"""Sparse patterns: factories of index predicates, composable by `|` and `&`, found by name in `PATTERNS`."""

from .base import PATTERNS, Band, Pattern, make_pattern, pattern_from_spec
from .bigbird import bigbird
from .dilated import dilated
from .drawing import Drawing
from .fixed import fixed
from .global_tokens import global_tokens
from .parts import Part
from .presets import longformer, streaming
from .retention import Retention
from .shifted import shifted
from .sinks import sinks
from .sliding_window import sliding_window
from .strided import strided

__all__ = [
    "PATTERNS",
    "Band",
    "Drawing",
    "Part",
    "Pattern",
    "Retention",
    "bigbird",
    "dilated",
    "fixed",
    "global_tokens",
    "longformer",
    "make_pattern",
    "pattern_from_spec",
    "shifted",
    "sinks",
    "sliding_window",
    "streaming",
    "strided",
]
