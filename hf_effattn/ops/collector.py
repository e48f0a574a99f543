"""Joining the outputs of consecutive blocks of queries."""

from __future__ import annotations

import torch

from .folding import unfold


class Collector:
    """Gathers the outputs of consecutive segments into one tensor `[B, H, T, V]`.

    Without autograd they are written into place as they come; with it they are kept and joined at the end.
    """

    def __init__(self, query: torch.Tensor, value_dim: int) -> None:
        self.batch, self.heads, tokens, _ = query.shape
        self.dtype = query.dtype
        self.parts: list[torch.Tensor] = []
        self.whole = None
        if not torch.is_grad_enabled():
            self.whole = query.new_empty(self.batch, tokens, self.heads, value_dim)
            self.filled = 0

    def add(self, output: torch.Tensor) -> None:
        """Append `[B, H, tokens, V]`."""
        if self.whole is None:
            self.parts.append(output.to(self.dtype))
        else:
            self._next(output.shape[2]).transpose(1, 2).copy_(output)

    def add_quotient(self, sums: torch.Tensor, least: float, chunk: int, tokens: int) -> None:
        """Append numerators over denominators.

        Args:
            sums: Numerators, and denominators as their last column, folded into chunks `[B·N, G, R·C, V+1]`.
            least: A denominator counts as at least this much.
            chunk: C.
            tokens: How many of the N·C tokens there are.
        """
        sums = sums.view(self.batch, -1, self.heads, chunk, sums.shape[-1])  # [B, N, H, C, V+1]
        factor = sums[..., -1:].to(torch.promote_types(sums.dtype, torch.float32)).clamp(min=least).reciprocal()
        if self.whole is not None and tokens % chunk == 0:
            slot = self._next(tokens).unflatten(1, (-1, chunk)).transpose(2, 3)  # [B, N, H, C, V]
            torch.mul(sums[..., :-1], factor, out=slot)
        else:
            output = sums[..., :-1] * factor
            self.add(unfold(output.flatten(0, 1), self.batch, tokens))

    def result(self) -> torch.Tensor:
        if self.whole is not None:
            return self.whole.transpose(1, 2)
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=2)

    def _next(self, tokens: int) -> torch.Tensor:
        """The place of the next tokens `[B, tokens, H, V]`."""
        assert self.whole is not None
        self.filled += tokens
        return self.whole[:, self.filled - tokens : self.filled]
