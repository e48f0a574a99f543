"""The sliding window."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..notation import whole_number
from .base import Band, Pattern, register_pattern
from .parts import Part, query_block
from .retention import Retention


@register_pattern("sliding_window")
def sliding_window(window: int | Sequence[int]) -> Pattern:
    """The last `window` keys, the query's own included: `i − j < window` (Longformer, arXiv 2004.05150).

    Args:
        window: For all heads, or one for each query head of the layer. A cache keeps the longest.
    """
    windows = [whole_number("window", each, 1) for each in (window if isinstance(window, Sequence) else [window])]
    if not windows:
        raise ValueError("window must be a number, or one for each query head; got an empty list")
    longest = max(windows)

    def same(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q - k < longest)

    def by_head(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q - k < torch.tensor(windows, device=q.device)[h])

    alike = len(windows) == 1
    part = Part(
        same if alike else by_head,
        lambda start, stop: [(start - longest + 1, stop, 1)],
        block_size=query_block(longest),
    )
    return Pattern(
        part.mask_mod,
        Retention(longest),
        Band(longest) if alike else None,
        parts=(part,),
        num_heads=None if alike else len(windows),
    )
