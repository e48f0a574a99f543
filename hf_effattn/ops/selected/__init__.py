"""Softmax attention over blocks of keys that each query selects: validation and the choice of the backend."""

from __future__ import annotations

import torch

from ...notation import check_heads
from ..sparse import flash
from . import gathered, masked, reference
from .recurrent import step
from .selection import Selection

BACKENDS = {
    "reference": reference.selected_attention,
    "masked": masked.selected_attention,
    "gathered": gathered.selected_attention,
}

__all__ = ["BACKENDS", "Selection", "choose_backend", "selected_attention", "step"]


def choose_backend(backend: str, device: str, is_long: bool = True) -> str:
    """Return the backend that computes many queries: "auto" gathers on a CPU where the text is long enough for it to be
    the faster one.

    Raises:
        ValueError: for an unknown backend, or one that does not work there.
    """
    can_gather = device == "cpu" and flash.is_available()
    if backend == "auto":
        return "gathered" if can_gather and is_long and not torch.compiler.is_compiling() else "masked"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: auto, {', '.join(BACKENDS)}")
    if backend == "gathered" and not can_gather:
        raise ValueError(f"backend 'gathered' computes on a CPU, not on {device!r}; use 'auto' or 'masked'")
    return backend


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary: torch.Tensor,
    positions: torch.Tensor,
    selection: Selection,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute `softmax(q·kᵀ · scale over the keys of the selected blocks up to the query's) v`.

    Gradients go through the attention, not through the choice.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, G, S, D]`, key j at position j, the queries' own among them; S a multiple of the block size. What lies
            behind the last query of a row is seen by nobody.
        value: `[B, G, S, V]`.
        summary: Of each block `[B, G, N, P, D]`, float32; that of blocks which are not full is not read.
        positions: Of the queries `[B or 1, T]`.
        selection: Selector, sizes, scale.
        backend: "reference", "masked" (the work of dense attention), "gathered" (only what is selected, on a CPU), or
            "auto".

    Raises:
        ValueError: if shapes do not fit together, or for an unknown backend.
    """
    check_heads(query, key, value, "D")
    size = selection.block_size
    if key.shape[2] % size or summary.shape[2] != key.shape[2] // size:
        raise ValueError(f"{key.shape[2]} keys are not {summary.shape[2]} blocks of {size}")
    is_long = key.shape[2] > 2 * size * selection.num_blocks
    backend = choose_backend(backend, query.device.type, is_long)
    return BACKENDS[backend](query, key, value, summary, positions, selection)
