"""Joining the outputs of consecutive blocks of queries."""

from __future__ import annotations

import torch


class Collector:
    """Gathers the outputs of consecutive segments into one tensor `[B, H, T, V]`.

    Without autograd they are written into place as they come; with it they are kept and joined at the end.
    """

    def __init__(self, query: torch.Tensor, value_dim: int) -> None:
        batch, heads, tokens, _ = query.shape
        self.parts: list[torch.Tensor] = []
        self.whole = None
        if not torch.is_grad_enabled():
            self.whole = query.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)
            self.filled = 0

    def add(self, output: torch.Tensor) -> None:
        if self.whole is None:
            self.parts.append(output)
        else:
            self.whole[:, :, self.filled : self.filled + output.shape[2]] = output
            self.filled += output.shape[2]

    def result(self) -> torch.Tensor:
        if self.whole is not None:
            return self.whole
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=2)
