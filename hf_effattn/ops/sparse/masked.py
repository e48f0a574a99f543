"""Sparse attention of any pattern by masked softmax attention, a block of queries at a time.

It saves memory (no T×S matrix, only a block of its rows), not computation: the work is that of dense attention. With a
single query (decoding) over a pruned cache it computes what is visible and little more.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...patterns import Pattern
from ..folding import heads_as_rows

QUERY_BLOCK = 256
ROWS = 4  # from which on products of rows are faster in 16 bits, too


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
    """Compute what the reference computes; same arguments."""
    outputs = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        visible = pattern.visible(query_positions[:, block], key_positions, query.shape[1])
        seen = visible.any(dim=-1, keepdim=True)
        output = attend(query[:, :, block], key, value, visible | ~seen, scale, dropout)
        outputs.append(output.masked_fill(~seen, 0.0))
    return torch.cat(outputs, dim=2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention of grouped heads under `mask` (boolean, or additive in the query's dtype; None for all)."""
    heads, groups = query.shape[1], key.shape[1]
    few = heads // groups < (ROWS if query.dtype.itemsize < 4 else 2)
    if query.shape[2] == 1 and not few and (mask is None or mask.ndim < 4 or mask.shape[1] == 1):
        rows = heads_as_rows(query, groups)
        output = functional.scaled_dot_product_attention(
            rows, key, value, attn_mask=mask, scale=scale, dropout_p=dropout
        )
        return output.reshape(*query.shape[:3], -1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout, enable_gqa=heads != groups
    )


def attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Softmax attention of grouped heads over the whole past: what a window longer than the text amounts to."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1]
    )
