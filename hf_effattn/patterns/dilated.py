"""The dilated window."""

from __future__ import annotations

from ..notation import whole_number
from .base import Band, Pattern, Retention, register_pattern


@register_pattern("dilated")
def dilated(window: int, stride: int) -> Pattern:
    """Every `stride`-th key back, `window` of them: `(i−j) mod stride = 0` and `(i−j)/stride < window`
    (Longformer, arXiv 2004.05150)."""
    whole_number("window", window, 1)
    whole_number("stride", stride, 1)
    reach = window * stride

    return Pattern(
        lambda b, h, q, k: (k <= q) & (q - k < reach) & ((q - k) % stride == 0),
        Retention(reach - stride + 1),
        Band(window) if stride == 1 else None,
    )
