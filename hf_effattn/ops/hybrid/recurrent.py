"""Hybrid attention for one token: the form of decoding."""

from __future__ import annotations

import torch

from ...notation import compute_dtype
from ..linear import LinearState
from ..linear.recurrent import read
from .logit import is_relative, linear_logit
from .options import HybridOptions


def step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    state: LinearState,
    options: HybridOptions,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the output `[B, H, 1, V]` of one query.

    Args:
        query: `[B, H, 1, D]`.
        keys, values: Window and sinks in any order, the query's own key among them, `[B, G, S, ·]`.
        visible: Which of them are real `[B, S]`; None for all.
        state: The linear past: every key that has left the window.
        options: The layer's constants and learned parts.
        position: Position of the query in each row `[B, 1]`, for feature maps that use it.
    """
    batch, heads = query.shape[:2]
    kv_heads, wide = keys.shape[1], state.sums.dtype
    q = options.scored(query).reshape(batch, kv_heads, heads // kv_heads, -1)
    dtype = compute_dtype(query.dtype)
    k = options.scored(keys).to(dtype)
    scores = torch.matmul(q.to(dtype), k.transpose(2, 3)).to(wide) * options.scale  # [B, G, R, S]
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    sums = read(options.plan(query_at=position).queries(query), state)
    logit = linear_logit(sums[..., -1:], options.bias.to(wide).view(kv_heads, -1, 1), options.join)
    if is_relative(options.join):
        logit = logit + scores.amax(dim=-1, keepdim=True)
    weights = torch.cat((scores, logit), dim=-1).softmax(dim=-1)
    output = torch.matmul(weights[..., :-1].to(dtype), values.to(dtype)).to(wide)
    output = output + weights[..., -1:] * options.linear_value(sums)
    return output.view(batch, heads, 1, -1).to(query.dtype)
