"""The dilated window."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import Band, Pattern, register_pattern
from .parts import Part, query_block
from .retention import Retention


@register_pattern("dilated", alike=True)
def dilated(window: int, stride: int) -> Pattern:
    """Every `stride`-th key back, `window` of them: `(i−j) mod stride = 0` and `(i−j)/stride < window`
    (Longformer, arXiv 2004.05150)."""
    whole_number("window", window, 1)
    whole_number("stride", stride, 1)
    reach = window * stride

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q - k < reach) & ((q - k) % stride == 0)

    return Pattern(
        mask_mod,
        Retention(reach - stride + 1),
        Band(window) if stride == 1 else None,
        parts=(
            Part(
                mask_mod,
                lambda start, stop: [(start - reach + stride, stop, stride)],
                stride,
                query_block(window),
                relative=True,
            ),
        ),
    )
