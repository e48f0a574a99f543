"""Sparse attention of any pattern by masked softmax attention, a block of queries at a time.

It saves memory (no T×S matrix, only a block of its rows), not computation: the work is that of dense attention. With a
single query (decoding) over a pruned cache it computes what is visible and little more.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...notation import may_overwrite
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


def wants_columns(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether one query after the other would find keys faster by dimension than by position: on a CPU two products of
    the heads that share keys take three quarters of the time of PyTorch's kernel then. Beams move their rows at each
    step, so one row only; in 16 bits such products are slow."""
    is_plain = key.stride(3) == 1 and key.dtype == torch.float32 and key.device.type == "cpu"
    alone = query.shape[0] == 1 and query.shape[1] > key.shape[1]
    return is_plain and alone and may_overwrite(key) and not torch.compiler.is_compiling()


def as_columns(key: torch.Tensor) -> torch.Tensor:
    """Return the same keys `[B, G, S, D]`, stored by dimension."""
    return key.transpose(2, 3).contiguous().transpose(2, 3)


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
    in_columns = key.stride(2) == 1 and key.dtype == torch.float32 and key.device.type == "cpu"
    if in_columns and query.shape[:3:2] == (1, 1) and mask is None and not dropout:
        rows = heads_as_rows(query, groups)[0]
        scores = torch.baddbmm(rows.new_empty(1), rows, key[0].transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), value[0]).view(1, heads, 1, -1)
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
