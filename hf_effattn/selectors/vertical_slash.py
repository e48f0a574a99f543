"""The selector of MInference's vertical-slash pattern, in a causal form."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from ..notation import coarse, whole_number
from .base import SELECTORS, Selector

VOTERS = 8  # a stretch of queries is chosen for by the last eighth of the one before


@SELECTORS.register("vertical_slash")
class VerticalSlash(Selector):
    """The columns and the diagonals of the attention matrix that got the largest weights, summed over the last queries
    (MInference, Jiang 2024, arXiv 2407.02490).

    There the last 64 queries of a prompt vote for all of it, so early tokens depend on late ones. Here queries come in
    stretches of `block_size`. The last eighth of a stretch, W queries, votes for the next one, and the first stretch
    sees everything. A query sees, up to itself: its own stretch, `num_columns` keys before that, and `num_diagonals`
    distances, in bands of W; the band of the distances below W is always among them. Distances longer than any voter's
    come last. Query heads that share a key/value
    head vote together.
    """

    kind = "vertical_slash"
    options: ClassVar[dict[str, int]] = {"num_columns": 1024, "num_diagonals": 1024, "block_size": 512}

    @classmethod
    def check(cls, options: dict[str, int]) -> None:
        whole_number("num_columns", options["num_columns"], 1)
        size = whole_number("block_size", options["block_size"], VOTERS)
        if size % VOTERS:
            raise ValueError(f"block_size must be a multiple of {VOTERS}; got {size}")
        if whole_number("num_diagonals", options["num_diagonals"], 1) % (size // VOTERS):
            raise ValueError(
                f"num_diagonals must be a multiple of {size // VOTERS}, an eighth of block_size; "
                f"got {options['num_diagonals']}"
            )

    def __init__(self, num_columns: int, num_diagonals: int, block_size: int) -> None:
        self.num_columns, self.block_size = num_columns, block_size
        self.width = block_size // VOTERS
        self.num_bands = num_diagonals // self.width

    @torch.no_grad()
    def vote(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns `[B, G, num_columns]`, positions of keys, and the bands `[B, G, num_bands]`, distances
        over W; −1 where there are fewer.

        Args:
            query: The voters `[B, H, W, D]`, the last W of S tokens.
            key: `[B, G, S, D]`.
            scale: Factor of the scores.
        """
        batch, kv_heads, total, _ = key.shape
        width = query.shape[2]
        by_head = query.float().unflatten(1, (kv_heads, -1))  # [B, G, R, W, D]
        scores = torch.matmul(by_head, key.float().transpose(2, 3)[:, :, None]) * scale
        index = torch.arange(total, device=key.device)
        place = index[total - width :, None]  # [W, 1]
        weights = scores.masked_fill(index > place, -torch.inf).softmax(dim=-1).sum(dim=2)  # [B, G, W, S]
        columns = _best(weights.sum(dim=2), self.num_columns)
        distance = functional.pad(weights, (0, 1))  # a place for keys before the text
        before = (place - index).clamp(min=-1)  # [W, S]: the key at each distance
        before = before.masked_fill(before < 0, total).expand(batch, kv_heads, -1, -1)
        diagonals = distance.gather(3, before).sum(dim=2)
        diagonals = (
            functional.pad(diagonals, (0, -total % width + self.block_size)).unflatten(2, (-1, width)).sum(dim=3)
        )
        diagonals[:, :, 0] = torch.inf
        return columns, _best(diagonals, self.num_bands)


def _best(mass: torch.Tensor, number: int) -> torch.Tensor:
    """Return the `number` places of the largest mass `[..., number]`; of equals the earlier, −1 for none."""
    order = coarse(mass).argsort(dim=-1, descending=True, stable=True)[..., :number]
    return functional.pad(order, (0, number - order.shape[-1]), value=-1)
