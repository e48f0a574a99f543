"""The definition of attention over selected blocks, with T×S matrices in float64: slow on purpose, the oracle of the
tests."""

from __future__ import annotations

import torch

from .selection import Selection


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary: torch.Tensor,
    positions: torch.Tensor,
    selection: Selection,
) -> torch.Tensor:
    """Compute with explicit weights; arguments as in `hf_effattn.ops.selected.selected_attention`."""
    groups = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    blocks = selection.blocks(query, summary, positions)  # [B, G, T, num_blocks]
    place = torch.arange(key.shape[2], device=key.device)
    seen = (place // selection.block_size == blocks[..., None]).any(dim=3)  # [B, G, T, S]
    seen = (seen & (place <= positions[:, None, :, None])).repeat_interleave(groups, dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", query.double() * selection.scale, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhts,bhsv->bhtv", scores.softmax(dim=-1), v).to(query.dtype)
