"""Patterns that are compositions of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .base import Pattern, register_pattern
from .global_tokens import global_tokens
from .sinks import sinks
from .sliding_window import sliding_window


@register_pattern("streaming")
def streaming(window: int | Sequence[int | None], num_sinks: int = 4) -> Pattern:
    """A sliding window joined with attention sinks (StreamingLLM, arXiv 2309.17453)."""
    return sliding_window(window) | sinks(num_sinks)


@register_pattern("longformer")
def longformer(window: int | Sequence[int | None], positions: Iterable[int] = (0,)) -> Pattern:
    """A sliding window, for all heads or one for each, joined with global tokens (Longformer, arXiv 2004.05150)."""
    return sliding_window(window) | global_tokens(positions)
