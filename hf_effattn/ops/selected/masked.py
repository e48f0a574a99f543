"""Attention over selected blocks by masked softmax attention, a block of queries at a time: memory stays linear in the
text, the work is that of dense attention."""

from __future__ import annotations

import torch

from ..sparse.masked import QUERY_BLOCK, attend
from .selection import Selection


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary: torch.Tensor,
    positions: torch.Tensor,
    selection: Selection,
) -> torch.Tensor:
    """Compute under masks; arguments as in `hf_effattn.ops.selected.selected_attention`."""
    groups, size = query.shape[1] // key.shape[1], selection.block_size
    place = torch.arange(key.shape[2], device=key.device)
    outputs = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        part, at = query[:, :, start : start + QUERY_BLOCK], positions[:, start : start + QUERY_BLOCK]
        blocks = selection.blocks(part, summary, at)
        chosen = blocks.new_zeros(*blocks.shape[:3], summary.shape[2] + 1).scatter_(3, blocks + 1, 1).bool()[..., 1:]
        seen = chosen.repeat_interleave(size, dim=3)[..., : key.shape[2]] & (place <= at[:, None, :, None])
        outputs.append(attend(part, key, value, seen.repeat_interleave(groups, dim=1), selection.scale))
    return torch.cat(outputs, dim=2)
