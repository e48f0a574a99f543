"""Causal linear attention over mapped queries and keys: validation and the choice of the backend."""

from __future__ import annotations

import torch

from ...feature_maps import FeatureMap
from ...notation import check_heads, check_padding
from ...recurrences import Recurrence
from . import chunked, recurrent, reference, triton
from .plan import Plan
from .state import EPS, LinearOutput, LinearState, empty_state

BACKENDS = {
    "reference": reference.linear_attention,
    "chunked": chunked.linear_attention,
    "recurrent": recurrent.linear_attention,
    "triton": triton.linear_attention,
}
CHUNK_SIZE = 64

__all__ = ["BACKENDS", "CHUNK_SIZE", "EPS", "LinearOutput", "LinearState", "Plan", "empty_state", "linear_attention"]


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    state: LinearState | None = None,
    padding_mask: torch.Tensor | None = None,
    query_map: FeatureMap | None = None,
    key_map: FeatureMap | None = None,
    positions: torch.Tensor | None = None,
    recurrence: Recurrence | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> LinearOutput:
    """Compute causal normalised linear attention `o_t = φ(q_t)ᵀ S_t / max(φ(q_t)ᵀ z_t, 1e-6)`.

    `S_t = S_{t-1} + φ(k_t) v_tᵀ` and `z_t = z_{t-1} + φ(k_t)` (Katharopoulos 2020, arXiv 2006.16236).

    Args:
        query: q `[B, H, T, D]`, any floating dtype; without `query_map` the features φ(q) `[B, H, T, F]`.
        key: k `[B, G, T, D]` or φ(k) `[B, G, T, F]`, H a multiple of G: consecutive query heads share a key/value head.
            A recurrence may want more behind them (see `Recurrence.read_hidden`).
        value: v `[B, G, T, V]`.
        state: The state after the tokens before these; None for no past.
        padding_mask: Booleans `[B, T]`, True = keep. A padded token leaves the state as it was; its own output has no
            meaning.
        query_map: φ for queries; key_map: φ for keys. Both or none. The chunked backend maps segment by segment, so
            that features of a long text are never all there at once, and maps again on the way back.
        positions: Of the tokens `[B or 1, T]`, for maps that use them.
        recurrence: How the state goes from token to token; None for this sum.
        chunk_size: Tokens of one chunk (default 64); changes speed and rounding only.
        backend: "reference", "chunked", "recurrent", "triton" (on CUDA, without the delta rule; needs the extra
            `triton`), or "auto" (recurrent for one token, else chunked).

    Returns:
        LinearOutput: output `[B, H, T, V]` in the dtype of the query, and the float32 state after the last token.

    Raises:
        ValueError: if shapes do not fit together, for an unknown backend, or for what the backend does not compute.
        TypeError: if dtypes do not.
        ImportError: for a backend whose package is missing.
    """
    check_heads(query, key if recurrence is None else recurrence.without_gates(key), value, "F")
    batch, _, tokens, _ = query.shape
    chunk = chunk_size or CHUNK_SIZE
    if recurrence is not None:
        chunk = recurrence.chunk_size(chunk)
    plan = Plan(query_map, key_map, chunk, positions, positions, padding_mask, recurrence)
    features = plan.feature_dim(key)
    if key.shape[2] != tokens:
        raise ValueError(f"query has {tokens} tokens and key {key.shape[2]}; the past comes as `state`")
    check_padding(padding_mask, batch, tokens)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    if backend == "auto":
        backend = "recurrent" if tokens == 1 else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: auto, {', '.join(BACKENDS)}")
    if state is None:
        state = empty_state(batch, key.shape[1], features, value.shape[-1], like=query)
    elif state.sums.shape != (batch, key.shape[1], features, value.shape[-1] + 1):
        expected = [batch, key.shape[1], features, value.shape[-1] + 1]
        raise ValueError(f"state.sums must be [B,G,F,V+1] = {expected}; got {list(state.sums.shape)}")
    if tokens == 0:
        return LinearOutput(query.new_zeros(*query.shape[:3], value.shape[-1]), state)
    return BACKENDS[backend](query, key, value, state, plan)
