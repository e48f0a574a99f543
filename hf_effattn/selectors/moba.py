"""The selector of MoBA."""

from __future__ import annotations

import torch

from .base import SELECTORS, BlockSelector


@SELECTORS.register("moba")
class MoBA(BlockSelector):
    """The score with the mean of a block's keys, `s = q · mean(K)` (MoBA, Lu 2025, arXiv 2502.13189). The summary is
    their sum: blocks that can be chosen are complete, so the order is the same."""

    num_vectors = 1

    def summary(self, keys: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return keys.float().masked_fill(~real, 0.0).sum(dim=-2, keepdim=True)

    def extended(self, summary: torch.Tensor, key: torch.Tensor, is_first: torch.Tensor | bool) -> torch.Tensor:
        key = key[..., None, :].to(summary.dtype)
        if isinstance(is_first, bool):
            return key if is_first else summary + key
        return torch.where(is_first, key, summary + key)

    def scores(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        return torch.matmul(query, summary.flatten(3).transpose(2, 3))
