"""The fixed pattern of the Sparse Transformer."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import Pattern, register_pattern
from .parts import Part
from .retention import Retention


@register_pattern("fixed", alike=True)
def fixed(stride: int, num_summary: int = 8) -> Pattern:
    """The own block of `stride` keys and the last `num_summary` of every block: `⌊j/stride⌋ = ⌊i/stride⌋` or
    `j mod stride ≥ stride − num_summary` (Sparse Transformer, Child 2019, arXiv 1904.10509).

    A cache keeps a block and the summaries, which grow with the text: `num_summary` of every `stride` keys.
    """
    whole_number("stride", stride, 1)
    whole_number("num_summary", num_summary, 1)
    if num_summary > stride:
        raise ValueError(f"num_summary must be at most stride ({stride}); got {num_summary}")

    def own(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.div(q, stride, rounding_mode="floor") == torch.div(k, stride, rounding_mode="floor")

    def summary(k: torch.Tensor) -> torch.Tensor:
        return k % stride >= stride - num_summary

    def first(position: int) -> int:
        return position // stride * stride

    size, exact = max(stride, 64), stride >= 64  # then one own block at a time
    block = Part(
        lambda b, h, q, k: (k <= q) & own(q, k),
        lambda start, stop: [(first(start), stop, 1)],
        block_size=size,
        exact=exact,
    )
    columns = Part(
        lambda b, h, q, k: (k <= q) & ~own(q, k) & summary(k),
        lambda start, stop: [(stride - 1 - i, first(start if exact else stop), stride) for i in range(num_summary)],
        block_size=size,
        exact=exact,
        growing=True,
    )
    return Pattern(
        lambda b, h, q, k: (k <= q) & (own(q, k) | summary(k)),
        Retention(stride, columns=(stride, num_summary)),
        parts=(block, columns),
    )
