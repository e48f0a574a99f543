"""The eviction of SnapKV."""

from __future__ import annotations

import torch
from torch.nn import functional

from .base import EVICTIONS, Eviction, Evidence

POOLED = 5  # neighbouring keys whose votes are averaged, so that stretches stay together


@EVICTIONS.register("snapkv")
class SnapKV(Eviction):
    """The last 32 queries vote with their attention weights, votes are averaged over 5 neighbours, and the winners stay
    beside the last 32 tokens (SnapKV, Li 2024, arXiv 2404.14469)."""

    num_queries = 32

    def importance(self, evidence: Evidence) -> torch.Tensor:
        votes = evidence.weights().sum(dim=(2, 3))
        return functional.avg_pool1d(votes, POOLED, stride=1, padding=POOLED // 2, count_include_pad=False)

    def num_recent(self, capacity: int) -> int:
        return min(self.num_queries, capacity // 2)
