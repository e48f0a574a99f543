"""The strided pattern of the Sparse Transformer."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import Pattern, register_pattern
from .parts import Part, union
from .retention import Retention
from .sliding_window import sliding_window


@register_pattern("strided", alike=True)
def strided(stride: int) -> Pattern:
    """The last `stride` keys and every `stride`-th before: `i−j < stride` or `(i−j) mod stride = 0`
    (Sparse Transformer, Child 2019, arXiv 1904.10509). Any key may be hit again, so a cache keeps them all."""
    whole_number("stride", stride, 1)

    def column(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & ((q - k) % stride == 0)

    columns = Part(column, lambda start, stop: [(start % stride, stop, stride)], stride, relative=True)
    return Pattern(
        lambda b, h, q, k: (k <= q) & ((q - k < stride) | ((q - k) % stride == 0)),
        Retention(),
        parts=union(sliding_window(stride).parts, (columns,)),
    )
