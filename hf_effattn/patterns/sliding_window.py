"""The sliding window."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..notation import whole_number
from .base import Band, Pattern, register_pattern
from .parts import Part, query_block
from .retention import Retention

EVERY_KEY = torch.iinfo(torch.int32).max  # a window that no text fills, in numbers that every kernel can count


@register_pattern("sliding_window")
def sliding_window(window: int | Sequence[int | None]) -> Pattern:
    """The last `window` keys, the query's own included: `i − j < window` (Longformer, arXiv 2004.05150).

    Args:
        window: For all heads, or a list of one for each query head of the layer (or each key/value head), in which None
            stands for a head that sees every key. A cache keeps, for each key/value head, the longest window of the
            query heads that share it.
    """
    windows = _windows(window)
    widths = [EVERY_KEY if each is None else each for each in windows]
    longest = max(widths)

    def same(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q - k < longest)

    def by_head(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q - k < torch.tensor(widths, device=q.device)[h])

    alike, kept = len(set(windows)) == 1, None if None in windows else longest
    part = Part(
        same if alike else by_head,
        lambda start, stop: [(0 if kept is None else start - kept + 1, stop, 1)],
        block_size=query_block(longest),
        relative=alike,
    )
    return Pattern(
        part.mask_mod,
        Retention(kept),
        Band(kept) if alike else None,
        parts=(part,),
        num_heads=None if len(windows) == 1 else len(windows),
        for_heads=lambda heads: sliding_window(windows if len(windows) == 1 else [windows[head] for head in heads]),
    )


def _windows(window: int | Sequence[int | None]) -> list[int | None]:
    """Return the window of each head, or the one of all heads."""
    if not isinstance(window, Sequence) or isinstance(window, str):
        return [whole_number("window", window, 1)]
    if not window:
        raise ValueError("window must be a number, or one for each head; got an empty list")
    return [None if each is None else whole_number("each window that is not None", each, 1) for each in window]
