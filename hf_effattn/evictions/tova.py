"""The eviction of TOVA."""

from __future__ import annotations

import torch

from .base import EVICTIONS, Eviction, Evidence


@EVICTIONS.register("tova")
class TOVA(Eviction):
    """What the last query attends to least goes (TOVA, Oren 2024, arXiv 2401.06104). The paper decides for all heads of
    a layer at once, here each key/value head does for its query heads."""

    num_queries = 1

    def importance(self, evidence: Evidence) -> torch.Tensor:
        return evidence.weights().mean(dim=(2, 3))
