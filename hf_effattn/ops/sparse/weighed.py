"""Softmax attention whose weights are summed for each key, for evictions that go by what keys have got so far."""

from __future__ import annotations

import torch

from .masked import QUERY_BLOCK


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, T, V]` and the sum of each key's weights over queries and heads `[B, G, S]`, float32.

    Args:
        query: `[B, H, T, D]`; key `[B, G, S, D]`; value `[B, G, S, V]`.
        seen: Which keys each query sees `[B, 1 or G, T, S]`; a query that sees none gets zero and gives none.
    """
    batch, heads, tokens, _ = query.shape
    groups = query.shape[1] // key.shape[1]
    mass = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    outputs = []
    for start in range(0, tokens, QUERY_BLOCK):
        q = query[:, :, start : start + QUERY_BLOCK].unflatten(1, (-1, groups))  # [B, G, R, t, D]
        hidden = ~seen[:, :, None, start : start + QUERY_BLOCK]
        scores = torch.matmul(q, key[:, :, None].transpose(3, 4)).float() * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)
        mass += weights.sum(dim=(2, 3))
        outputs.append(torch.matmul(weights.to(value.dtype), value[:, :, None]).flatten(1, 2))
    return torch.cat(outputs, dim=2), mass
