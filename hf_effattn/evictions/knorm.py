"""Eviction by the norm of keys."""

from __future__ import annotations

import torch

from .base import EVICTIONS, Eviction, Evidence


@EVICTIONS.register("knorm")
class KNorm(Eviction):
    """Keys of small norm stay: they tend to get the most attention (Devoto 2024, arXiv 2406.11430)."""

    def importance(self, evidence: Evidence) -> torch.Tensor:
        return -evidence.keys.float().norm(dim=-1)
