"""Rows of different lengths: move the real tokens of each row to its front, compute, and move the results back.

After the move padding only follows real tokens, where a causal operation never looks. Documents packed into one row
become rows of their own the same way. Nothing else in ops/ has to know about padding or packing. `Front` works without
asking the device for values, so it can be compiled and exported; packing has to ask how long the documents are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Front(NamedTuple):
    """The regrouping that moves the real tokens of each row to its front, in their order.

    Args:
        order: For each slot the token it takes `[B, T]`: the real ones, then padding.
        padding_mask: `[B, T]`, True = keep.
    """

    order: torch.Tensor
    padding_mask: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each row `[B]`."""
        return self.padding_mask.sum(dim=1)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Regroup `[B, H, T, X]`."""
        return _take(x, self.order)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `gather`, with zeros for padding."""
        return _take(x, self.order.argsort(dim=1)).masked_fill(~self.padding_mask[:, None, :, None], 0.0)


class Rows(NamedTuple):
    """A regrouping of the tokens of a batch into other rows.

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


def front(padding_mask: torch.Tensor) -> Front:
    """Return the regrouping that moves the real tokens of `padding_mask` `[B, T]` to the front of their own row."""
    return Front(torch.argsort((~padding_mask).to(torch.uint8), dim=1, stable=True), padding_mask)


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


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take tokens `index` `[B, T]` of x `[B, H, T, X]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
