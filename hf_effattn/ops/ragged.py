"""Rows of different lengths: move the real tokens of each row to its front, compute, and move the results back.

After the move padding only follows real tokens, where a causal operation never looks. Documents packed into one row
become rows of their own the same way. Nothing else in ops/ has to know about padding or packing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """A regrouping of the tokens of a batch.

    Args:
        source: For each new row and slot the token `b·T + t` it takes, `[rows, slots]`.
        lengths: Real tokens of each new row `[rows]`; slots behind them hold padding (any token).
    """

    source: torch.Tensor
    lengths: torch.Tensor

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Take `[B, H, T, X]` to `[rows, H, slots, X]`."""
        return x.transpose(1, 2).flatten(0, 1)[self.source].transpose(1, 2)

    def scatter(self, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Put the real tokens of `rows` `[rows, H, slots, X]` where they came from in `output` `[B·T, H, X]`."""
        real = torch.arange(self.source.shape[1], device=self.source.device) < self.lengths[:, None]
        return output.index_put((self.source[real],), rows.transpose(1, 2)[real])


def front(padding_mask: torch.Tensor) -> Rows:
    """Return the regrouping that moves the real tokens of `padding_mask` `[B, T]` to the front of their own row."""
    batch, tokens = padding_mask.shape
    order = torch.argsort((~padding_mask).to(torch.uint8), dim=1, stable=True)
    return Rows(order + torch.arange(batch, device=order.device)[:, None] * tokens, padding_mask.sum(dim=1))


def documents(segment_ids: torch.Tensor) -> list[Rows]:
    """Return regroupings in which every segment of `segment_ids` `[B, T]` (0 = padding) is a row of its own.

    Segments of similar length (within a factor of two) share a regrouping, so padding at most doubles the work.
    """
    batch, tokens = segment_ids.shape
    flat = (segment_ids + torch.arange(batch, device=segment_ids.device)[:, None] * (tokens + 1)).flatten()
    real = (segment_ids > 0).flatten()
    names, counts = flat[real].unique(return_counts=True)
    positions = torch.arange(batch * tokens, device=flat.device)[real]
    order = torch.argsort(flat[real], stable=True)
    starts = counts.cumsum(0) - counts
    groups = []
    sizes = torch.ceil(torch.log2(counts.float()))
    for size in sizes.unique().tolist():
        chosen = (sizes == size).nonzero().squeeze(1)
        lengths = counts[chosen]
        slots = torch.arange(int(lengths.max()), device=flat.device).clamp(max=lengths[:, None] - 1)
        groups.append(Rows(positions[order[starts[chosen][:, None] + slots]], lengths))
    return groups
