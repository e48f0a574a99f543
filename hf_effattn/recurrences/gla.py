"""The learned gates of gated linear attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .base import RECURRENCES, Recurrence, RecurrenceShape

OPEN = 6.0  # b at the start: α = 0.99985, so half of the state is still there after some 4,500 tokens


@RECURRENCES.register("gla")
class GLA(Recurrence):
    """`α_t = sigmoid(W₂ W₁ x_t + b)^{1/16}` for each feature, with learned W₁ of rank 16 and x_t the input of the layer
    (Yang 2023, arXiv 2312.06635). Starts with W₂ = 0 and b = 6: almost the plain sum.

    The paper has no denominator but a norm on each head's output; here the denominator stays, since the output
    projection of a pretrained layer expects means of values.
    """

    per_feature = True
    num_gates = 16  # the rank: what is kept of a token is W₁ x_t

    def __init__(self, shape: RecurrenceShape) -> None:
        super().__init__(shape)
        heads, features = shape.num_kv_heads, shape.feature_dim
        self.down = nn.Parameter(torch.empty(self.num_gates, self._hidden_size()))  # W₁
        self.up = nn.Parameter(torch.empty(heads, features, self.num_gates))  # W₂ of each key/value head
        self.start = nn.Parameter(torch.empty(heads, 1, features))  # b
        self.reset_parameters()

    def read_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        read = functional.linear(hidden, self.down.to(hidden.dtype))  # [B, T, 16]
        return read[:, None].expand(-1, self.shape.num_kv_heads, -1, -1)

    def log_decay(self, key: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        raised = torch.matmul(read, self.up.to(read.dtype).transpose(1, 2))
        return functional.logsigmoid(raised + self.start.to(read.dtype)) / 16

    def start_for(self, rate: torch.Tensor) -> torch.Tensor:
        return -(16 * rate).expm1().log()[:, None, None].expand_as(self.start)

    @property
    def flops_per_token(self) -> int:
        shape = self.shape
        raised = 2 * shape.num_kv_heads * shape.feature_dim * self.num_gates
        return 2 * self.num_gates * (shape.hidden_size or 0) + raised

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
            self.up.zero_()
            self.start.fill_(OPEN)
