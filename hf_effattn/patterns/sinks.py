"""Attention sinks."""

from __future__ import annotations

import torch

from ..notation import whole_number
from .base import Band, Pattern, register_pattern
from .parts import Part
from .retention import Retention


@register_pattern("sinks", alike=True)
def sinks(num_sinks: int = 4) -> Pattern:
    """The first `num_sinks` keys: `j < num_sinks` (StreamingLLM, arXiv 2309.17453).

    Alone it leaves later queries nothing recent; join it to a window: `sliding_window(512) | sinks(4)`.
    """
    whole_number("num_sinks", num_sinks, 0)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (k < num_sinks)

    return Pattern(
        mask_mod,
        Retention(0, frozenset(range(num_sinks))),
        Band(0, num_sinks),
        parts=(Part(mask_mod, lambda start, stop: [(0, num_sinks, 1)]),),
    )
