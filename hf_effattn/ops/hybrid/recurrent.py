"""Hybrid attention for one token: the form of decoding."""

from __future__ import annotations

import torch

from ..linear import LinearState
from ..linear.recurrent import read
from .merge import merge
from .options import HybridOptions


def step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    state: LinearState,
    options: HybridOptions,
) -> torch.Tensor:
    """Compute the output `[B, H, 1, V]` of one query.

    Args:
        query: `[B, H, 1, D]`.
        keys, values: Window and sinks in any order, the query's own key among them, `[B, G, S, ·]`.
        visible: Which of them are real `[B, S]`; None for all.
        state: The linear past: every key that has left the window.
        options: The layer's constants and learned parts.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, wide = keys.shape[1], state.kv.dtype
    q = query.view(batch, kv_heads, heads // kv_heads, head_dim)
    scores = torch.matmul(q, keys.transpose(2, 3)).to(wide) * options.scale  # [B, G, R, S]
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    peak = scores.detach().amax(dim=-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - peak).exp()
    denominator = weights.sum(dim=-1, keepdim=True)
    numerator = torch.matmul(weights.to(values.dtype), values).to(wide)
    far, mass = read(options.query_map(query), state)
    shape = (batch, kv_heads, heads // kv_heads, -1)
    bias = options.bias.to(wide).view(1, kv_heads, -1, 1)
    output = merge(numerator, denominator, peak, far.view(shape), mass.view(shape), bias)
    return output.reshape(batch, heads, 1, -1).to(query.dtype)
