"""Attention over selected blocks for one token: the form of decoding, which reads the selected blocks only."""

from __future__ import annotations

import torch

from ..folding import heads_as_rows
from ..sparse.masked import attend
from .selection import Selection


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary: torch.Tensor,
    positions: torch.Tensor,
    selection: Selection,
) -> torch.Tensor:
    """Compute the output `[B, H, 1, V]` of one query; arguments as in `hf_effattn.ops.selected.selected_attention`."""
    batch, heads = query.shape[:2]
    kv_heads, size = key.shape[1], selection.block_size
    blocks = selection.blocks(query, summary, positions)[:, :, 0]  # [B, G, num_blocks]
    first = torch.arange(batch * kv_heads, device=key.device).view(batch, kv_heads, 1) * (key.shape[2] // size)
    index = (first + blocks.clamp(min=0)).flatten()
    keys, values = (
        x.reshape(-1, size * x.shape[3]).index_select(0, index).view(batch, kv_heads, -1, x.shape[3])
        for x in (key, value)
    )
    places = blocks[..., None] * size + torch.arange(size, device=key.device)  # [B, G, num_blocks, block_size]
    seen = (places >= 0) & (places <= positions[:, None, :, None])
    output = attend(heads_as_rows(query, kv_heads), keys, values, seen.view(batch, kv_heads, 1, -1), selection.scale)
    return output.view(batch, heads, 1, -1)
