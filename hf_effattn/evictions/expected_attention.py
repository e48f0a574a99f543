"""Eviction by the attention that future queries are expected to pay."""

from __future__ import annotations

import torch

from .base import EVICTIONS, Eviction, Evidence


@EVICTIONS.register("expected_attention")
class ExpectedAttention(Eviction):
    """If future queries are normal with mean μ and covariance Σ, a key can expect the weight `exp(s μ·k + s²/2 kᵀΣk)`,
    times the norm of its value (Devoto 2025, arXiv 2510.00636).

    Mean and covariance are those of the last 64 queries as they are, after rotary; the paper takes them before rotary
    and averages the rotations to come.
    """

    num_queries = 64

    def importance(self, evidence: Evidence) -> torch.Tensor:
        scores = evidence.scores()
        there = scores > -torch.inf
        number = there.sum(dim=3, keepdim=True).clamp(min=1)
        scores = scores.masked_fill(~there, 0.0)
        mean = scores.sum(dim=3, keepdim=True) / number
        variance = ((scores - mean).masked_fill(~there, 0.0).square().sum(dim=3, keepdim=True)) / number
        expected = (mean + variance / 2)[:, :, :, 0].logsumexp(dim=2)  # over the query heads
        return expected + evidence.values.float().norm(dim=-1).clamp(min=1e-30).log()

    def num_recent(self, capacity: int) -> int:
        return min(self.num_queries // 2, capacity // 2)
