"""Global tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..notation import whole_number
from .base import Pattern, register_pattern
from .parts import Part, Ranges
from .retention import Retention


@register_pattern("global_tokens", alike=True)
def global_tokens(positions: Iterable[int] = (0,)) -> Pattern:
    """Chosen positions that everybody sees and that see everything before them (Longformer, arXiv 2004.05150).

    A query at a global position sees its whole past, so a cache keeps, besides the global tokens, a window that reaches
    back from the last of them to the start; for now it keeps the window after that, too.

    Args:
        positions: The global positions, counted from the first real token of each row.
    """
    chosen = sorted({whole_number("positions", position, 0) for position in positions})
    if not chosen:
        raise ValueError("positions must name at least one global position, such as (0,)")

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        table = torch.tensor(chosen, dtype=q.dtype, device=q.device)
        return (k <= q) & (torch.isin(q, table) | torch.isin(k, table))

    def candidates(start: int, stop: int) -> Ranges:
        if any(start <= position < stop for position in chosen):
            return [(0, stop, 1)]
        return [(position, position + 1, 1) for position in chosen if position < stop]

    return Pattern(
        mask_mod, Retention(chosen[-1] + 1, frozenset(chosen)), parts=(Part(mask_mod, candidates, block_size=64),)
    )
