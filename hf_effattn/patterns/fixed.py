"""The fixed pattern of the Sparse Transformer."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import Pattern, register_pattern
from .parts import Part, Ranges
from .retention import Retention


@register_pattern("fixed", alike=True)
def fixed(stride: int, num_summary: int = 8) -> Pattern:
    """The own block of `stride` keys and the last `num_summary` of every block: `⌊j/stride⌋ = ⌊i/stride⌋` or
    `j mod stride ≥ stride − num_summary` (Sparse Transformer, Child 2019, arXiv 1904.10509).

    Summary columns grow with the text. For now a cache keeps every key.
    """
    whole_number("stride", stride, 1)
    whole_number("num_summary", num_summary, 1)
    if num_summary > stride:
        raise ValueError(f"num_summary must be at most stride ({stride}); got {num_summary}")

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own_block = torch.div(q, stride, rounding_mode="floor") == torch.div(k, stride, rounding_mode="floor")
        return (k <= q) & (own_block | (k % stride >= stride - num_summary))

    def candidates(start: int, stop: int) -> Ranges:
        own = start // stride * stride
        return [(own, stop, 1), *((stride - 1 - i, own, stride) for i in range(num_summary))]

    part = Part(mask_mod, candidates, block_size=max(stride, 64), exact=stride >= 64)  # then one own block at a time
    return Pattern(mask_mod, Retention(), parts=(part,))
