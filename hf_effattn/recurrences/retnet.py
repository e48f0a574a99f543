"""The fixed decay of RetNet."""

from __future__ import annotations

import torch

from .base import RECURRENCES, Recurrence, RecurrenceShape


@RECURRENCES.register("retnet")
class RetNet(Recurrence):
    """`α_h = 1 − 2^{−5−h}` for key/value head h, fixed: the first remembers some 32 tokens, each next twice as many
    (Sun 2023, arXiv 2307.08621).

    The paper has no denominator but a norm on each head's output; here the denominator stays, since the output
    projection of a pretrained layer expects means of values.
    """

    rates: torch.Tensor

    def __init__(self, shape: RecurrenceShape) -> None:
        super().__init__(shape)
        self.register_buffer("rates", torch.empty(shape.num_kv_heads))
        self.reset_parameters()

    def log_decay(self, key: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return self.rates.to(key.dtype)[None, :, None, None].expand(key.shape[0], -1, key.shape[2], 1)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.rates.copy_(torch.log1p(-(2.0 ** (-5.0 - torch.arange(self.shape.num_kv_heads)))))
