"""The delta rule."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..notation import by_row
from .base import RECURRENCES, Recurrence, RecurrenceShape


@RECURRENCES.register("delta")
class Delta(Recurrence):
    """`S_t = S_{t-1} + φ(k_t) β_t (v_t − S_{t-1}ᵀ φ(k_t))ᵀ` and `o_t = g S_tᵀ φ(q_t)` with features of length 1: a new
    value replaces what its key recalled (Schlag 2021, arXiv 2102.11174; in chunks, Yang 2024, arXiv 2406.06484).

    `β_t = sigmoid(w x_t)` with x_t the input of the layer and learned w of each key/value head, 0 at the start, where
    β = 1/2. In place of the papers' norm on each head's output there is a learned gain g `[H]`, 1 at the start. Behind
    a window the sum of the features tells how much the past weighs, as without delta rule.
    """

    delta = True
    num_gates = 1  # w x_t

    def __init__(self, shape: RecurrenceShape) -> None:
        super().__init__(shape)
        self.gate = nn.Parameter(torch.zeros(shape.num_kv_heads * self.num_gates, self._hidden_size()))  # w
        self.gain = nn.Parameter(torch.ones(shape.num_heads))  # g

    def read_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        read = functional.linear(hidden, self.gate.to(hidden.dtype))
        return read.unflatten(2, (self.shape.num_kv_heads, self.num_gates)).transpose(1, 2)

    def strength(self, read: torch.Tensor) -> torch.Tensor:
        return read[..., :1].sigmoid()

    def output(self, numerator: torch.Tensor) -> torch.Tensor:
        return numerator * by_row(self.gain.to(numerator.dtype), self.shape.num_kv_heads, numerator.shape[2])

    @property
    def flops_per_token(self) -> int:
        recall = 2 * self.shape.num_kv_heads * self.shape.feature_dim * self.shape.head_dim
        return super().flops_per_token + recall

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)
        nn.init.ones_(self.gain)
