"""The definition of sparse attention, with T×S matrices in float64: slow on purpose, the oracle of the tests."""

from __future__ import annotations

import torch
from torch.nn import functional

from ...patterns import Pattern


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute `softmax(q·kᵀ · scale over the visible keys) v`; a query that sees no key gets zero.

    Args:
        query: `[B, H, T, D]`; key `[B, G, S, D]`; value `[B, G, S, V]`.
        pattern: Decides visibility from positions.
        query_positions: `[B, T]`; key_positions `[B, S]`, negative for slots nobody sees, in any order.
        dropout: Probability with which weights are dropped.
    """
    groups = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))  # [B, H, S, ·]
    visible = pattern.visible(query_positions, key_positions, query.shape[1])
    scores = torch.einsum("bhtd,bhsd->bhts", query.double() * scale, k).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1).masked_fill(~visible, 0.0)  # rows without a visible key: nan, then zero
    weights = functional.dropout(weights, dropout)
    return torch.einsum("bhts,bhsv->bhtv", weights, v).to(query.dtype)
