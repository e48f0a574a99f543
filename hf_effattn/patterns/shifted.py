"""The shifted groups of LongLoRA."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import Pattern, register_pattern
from .parts import Part
from .retention import Retention


@register_pattern("shifted")
def shifted(group_size: int) -> Pattern:
    """The own group of `group_size` keys; for every other head the groups are shifted by half of that, so that
    neighbours meet (S² attention of LongLoRA, Chen 2023, arXiv 2309.12307).

    Meant for training on long texts; revert to softmax attention, or convert to another pattern, for use. Nothing
    leaks: the original's last group wraps around to the first one, here groups end where the text does.
    """
    whole_number("group_size", group_size, 2)
    half = group_size // 2

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        shift = h % 2 * half
        own, other = (torch.div(x + shift, group_size, rounding_mode="floor") for x in (q, k))
        return (k <= q) & (own == other)

    part = Part(mask_mod, lambda start, stop: [(start - group_size + 1, stop, 1)], block_size=max(half, 64))
    return Pattern(mask_mod, Retention(group_size), parts=(part,))
