"""The sliding window."""

from __future__ import annotations

from ..notation import whole_number
from .base import Band, Pattern, Retention, register_pattern


@register_pattern("sliding_window")
def sliding_window(window: int) -> Pattern:
    """The last `window` keys, the query's own included: `i − j < window` (Longformer, arXiv 2004.05150)."""
    whole_number("window", window, 1)

    return Pattern(lambda b, h, q, k: (k <= q) & (q - k < window), Retention(window), Band(window))
