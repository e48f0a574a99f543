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

    def together(q: torch.Tensor, k: torch.Tensor, size: int) -> torch.Tensor:
        return torch.div(q, size, rounding_mode="floor") == torch.div(k, size, rounding_mode="floor")

    def summary(k: torch.Tensor) -> torch.Tensor:
        return k % stride >= stride - num_summary

    # Queries meet the summaries before a pair of blocks at once, and those within it beside their own block, whose keys
    # they precede.
    pair, exact = 2 * stride, stride >= 64

    def near(start: int, stop: int) -> list[tuple[int, int, int]]:
        own = start // stride * stride
        if not exact:
            return [(start // pair * pair, stop, 1)]
        return [(own - num_summary if own % pair else own, stop, 1)]

    def far(start: int, stop: int) -> list[tuple[int, int, int]]:
        high = start // pair * pair if exact else stop
        return [(stride - 1 - i, high, stride) for i in range(num_summary)]

    columns = Part(
        lambda b, h, q, k: (k <= q) & ~together(q, k, pair) & summary(k),
        far,
        block_size=max(pair, 64),
        exact=exact,
        growing=True,
    )
    block = Part(
        lambda b, h, q, k: (k <= q) & together(q, k, pair) & (together(q, k, stride) | summary(k)),
        near,
        block_size=64 if stride % 64 == 0 or not exact else stride,
        exact=exact,
    )
    return Pattern(
        lambda b, h, q, k: (k <= q) & (together(q, k, stride) | summary(k)),
        Retention(stride, columns=(stride, num_summary)),
        parts=(columns, block),
    )
