"""Patterns that are compositions of others."""

from __future__ import annotations

from .base import Pattern, register_pattern
from .sinks import sinks
from .sliding_window import sliding_window


@register_pattern("streaming")
def streaming(window: int, num_sinks: int = 4) -> Pattern:
    """A sliding window joined with attention sinks (StreamingLLM, arXiv 2309.17453)."""
    return sliding_window(window) | sinks(num_sinks)
