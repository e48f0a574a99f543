"""Which blocks queries meet."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...selectors import BlockSelector
from ..folding import heads_as_rows


class Selection(NamedTuple):
    """How blocks are selected.

    Args:
        selector: What scores them.
        block_size: Tokens of a block; block b holds positions `b · block_size` and on.
        num_blocks: Blocks a query meets, the first and its own included.
        scale: Factor of the softmax scores.
    """

    selector: BlockSelector
    block_size: int
    num_blocks: int
    scale: float

    def blocks(self, query: torch.Tensor, summary: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the blocks each query meets `[B, G, T, num_blocks]`, negative where there are fewer.

        Args:
            query: `[B, H, T, D]`; summary: `[B, G, N, P, D]`, float32.
            positions: Of the queries `[B or 1, T]`.
        """
        heads, tokens = query.shape[1:3]
        kv_heads = summary.shape[1]
        with torch.no_grad():
            rows = heads_as_rows(query.float(), kv_heads)  # [B, G, R·T, D]
            scores = self.selector.scores(rows, summary).unflatten(2, (heads // kv_heads, tokens)).amax(dim=2)
            return self.selector.chosen(scores, positions // self.block_size, self.num_blocks)
