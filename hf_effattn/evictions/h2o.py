"""The eviction of H2O."""

from __future__ import annotations

import torch

from .base import EVICTIONS, Eviction, Evidence


@EVICTIONS.register("h2o")
class H2O(Eviction):
    """Half of the capacity is for the last tokens, half for heavy hitters: keys with the largest sum of all attention
    weights they ever got (H2O, Zhang 2023, arXiv 2306.14048)."""

    accumulates = True

    def importance(self, evidence: Evidence) -> torch.Tensor:
        return evidence.mass

    def num_recent(self, capacity: int) -> int:
        return capacity // 2
