"""The delta rule with a decay."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .base import RECURRENCES, RecurrenceShape
from .delta import Delta

SLOW = -8.8  # the decay's bias at the start: α = 0.99985, so half of the state is still there after some 4,500 tokens


@RECURRENCES.register("gated_delta")
class GatedDelta(Delta):
    """`S_t = α_t S_{t-1} + φ(k_t) β_t (v_t − α_t S_{t-1}ᵀ φ(k_t))ᵀ`: the delta rule of `delta`, and a decay of each
    key/value head, `log α_t = −exp(a) softplus(w x_t + b)` (Yang 2024, arXiv 2412.06464).

    Learned are the two w of each key/value head, 0 at the start, a = 0 and b = −8.8: almost no decay.
    """

    num_gates = 2  # w x_t for β and for α

    def __init__(self, shape: RecurrenceShape) -> None:
        super().__init__(shape)
        self.rate = nn.Parameter(torch.zeros(shape.num_kv_heads))  # a
        self.start = nn.Parameter(torch.full((shape.num_kv_heads,), SLOW))  # b

    def log_decay(self, key: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        rate, start = (x.to(read.dtype)[None, :, None, None] for x in (self.rate, self.start))
        return -rate.exp() * functional.softplus(read[..., 1:] + start)

    def start_for(self, rate: torch.Tensor) -> torch.Tensor:
        return (rate / self.rate.exp()).expm1().log()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.rate)
        nn.init.constant_(self.start, SLOW)
