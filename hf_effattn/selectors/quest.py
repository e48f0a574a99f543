"""The selector of Quest."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import SELECTORS, BlockSelector


@SELECTORS.register("quest")
class Quest(BlockSelector):
    """A bound of the highest score in a block: `u = Σ_c max(q_c m_c, q_c M_c)` with the least and the greatest value, m
    and M, of each channel of its keys (Quest, Tang 2024, arXiv 2406.10774)."""

    num_vectors = 2
    options: ClassVar[dict[str, int]] = {"block_size": 16, "num_blocks": 64}

    def summary(self, keys: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        least, most = keys.masked_fill(~real, torch.inf).amin(dim=-2), keys.masked_fill(~real, -torch.inf).amax(dim=-2)
        return torch.stack((least, most), dim=-2).float().masked_fill(~real.any(dim=-2, keepdim=True), 0.0)

    def extended(self, summary: torch.Tensor, key: torch.Tensor, is_first: torch.Tensor | bool) -> torch.Tensor:
        least, most = summary.unbind(dim=-2)
        key = key.to(summary.dtype)
        new = torch.stack((torch.minimum(least, key), torch.maximum(most, key)), dim=-2)
        if isinstance(is_first, bool):
            return torch.stack((key, key), dim=-2) if is_first else new
        return torch.where(is_first, key[..., None, :], new)

    def scores(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        split = torch.cat((query.clamp(max=0.0), query.clamp(min=0.0)), dim=-1)  # each meets the bound of its sign
        return torch.matmul(split, summary.flatten(3).transpose(2, 3))
