"""Sparse softmax attention under a pattern: validation and the choice of the backend."""

from __future__ import annotations

import torch

from ...notation import check_heads, check_padding
from ...patterns import Pattern
from .. import ragged
from ..stream import Stream
from . import banded, flash, flex, gathered, masked, reference
from .jobs import Places

BACKENDS = ("reference", "masked", "banded", "gathered", "flex")

__all__ = ["BACKENDS", "choose_backend", "sparse_attention"]


def choose_backend(pattern: Pattern, backend: str = "auto", device: str = "cpu") -> str:
    """Return the backend that computes `pattern`: "auto" prefers the banded one where the pattern is a window, then the
    gathered one, which works on a CPU, then the masked one.

    Raises:
        ValueError: for an unknown backend, or one that cannot compute the pattern there.
    """
    can_gather = bool(pattern.parts) and device == "cpu" and flash.is_available()
    if backend == "auto":
        return "banded" if pattern.is_windowed else "gathered" if can_gather else "masked"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: auto, {', '.join(BACKENDS)}")
    if backend == "banded" and not pattern.is_windowed:
        raise ValueError(f"backend 'banded' computes windows with or without sinks, not {pattern.describe()}")
    if backend == "gathered" and not can_gather:
        problem = f"on a CPU, not on {device!r}" if pattern.parts else f"of known parts, not {pattern.describe()}"
        raise ValueError(f"backend 'gathered' computes patterns {problem}; use 'auto' or 'masked'")
    if backend == "flex" and device not in ("cpu", "cuda"):
        raise ValueError(
            f"backend 'flex' computes on CUDA, or on a CPU without gradients, not on {device!r}; use 'auto' or 'masked'"
        )
    return backend


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    query_offset: int = 0,
    padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute `softmax(q·kᵀ · scale over the keys the pattern shows) v`; a query that sees no key gets zero.

    Args:
        query: `[B, H, T, D]`, the tokens at `query_offset .. query_offset + T − 1`.
        key: `[B, G, S, D]`, the tokens at `0 .. S − 1` with S = query_offset + T; H is a multiple of G.
        value: `[B, G, S, V]`.
        pattern: Which keys a query sees; see `hf_effattn.patterns`.
        query_offset: Number of tokens before the first query.
        padding_mask: Booleans `[B, S]`, True = keep. Padded keys are invisible, and windows, sinks and global
            positions count the real tokens of each row; outputs of padded queries have no meaning.
        scale: Factor of the scores, default 1/√D.
        backend: "reference", "masked" (any pattern), "banded" (windows with or without sinks), "gathered" (any
            pattern but custom ones, on a CPU), "flex" (any pattern, by FlexAttention on CUDA, on a CPU without
            gradients), or "auto", which never is "flex".

    Returns:
        Output `[B, H, T, V]` in the dtype of the query.

    Raises:
        ValueError: if shapes do not fit together, or the backend is unknown or cannot compute the pattern.
        TypeError: if dtypes do not.
    """
    check_heads(query, key, value, "D")
    batch, _, tokens, head_dim = query.shape
    total = key.shape[2]
    if query_offset < 0 or query_offset + tokens != total:
        raise ValueError(f"key must have query_offset + T = {query_offset} + {tokens} tokens; got {total}")
    check_padding(padding_mask, batch, total)
    if pattern.num_heads not in (None, query.shape[1]):
        raise ValueError(f"{pattern.describe()} is for {pattern.num_heads} query heads; got {query.shape[1]}")
    backend = choose_backend(pattern, backend, query.device.type)
    scale = head_dim**-0.5 if scale is None else scale
    if tokens == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if backend in ("banded", "gathered", "flex"):
        if padding_mask is None:
            return _plain(query, key, value, pattern, backend, scale)
        return _padded(query, key, value, pattern, backend, padding_mask, scale)
    if padding_mask is None:
        positions = torch.arange(total, device=query.device)[None].expand(batch, -1)
        key_positions = positions
    else:
        positions = padding_mask.cumsum(dim=1) - 1
        key_positions = positions.masked_fill(~padding_mask, -1)
    compute = reference.sparse_attention if backend == "reference" else masked.sparse_attention
    return compute(query, key, value, pattern, positions[:, query_offset:], key_positions, scale)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, backend: str, scale: float
) -> torch.Tensor:
    if backend != "banded":
        compute = flex.sparse_attention if backend == "flex" else gathered.sparse_attention
        return compute(query, key, value, pattern, Places(key.shape[2] - query.shape[2]), scale)
    assert pattern.band is not None
    return banded.sparse_attention(query, Stream(key, value), pattern.band, scale)


def _padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    backend: str,
    padding_mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute padded rows: real tokens move to the front, where padding no longer matters."""
    batch, heads, tokens, _ = query.shape
    total = key.shape[2]
    rows = ragged.front(padding_mask)
    queries = torch.cat((query.new_zeros(batch, heads, total - tokens, query.shape[3]), query), dim=2)
    output = _plain(rows.gather(queries), rows.gather(key), rows.gather(value), pattern, backend, scale)
    return rows.scatter(output)[:, :, total - tokens :]
