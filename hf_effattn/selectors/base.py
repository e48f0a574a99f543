"""What a selector is, and the registry of them."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..notation import whole_number
from ..registry import Registry

SELECTORS: Registry[type[Selector]] = Registry("selector")
FORCED = 2  # blocks that are always chosen: the first, where attention sinks are, and the query's own
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)  # that the store of keys is made of


class Selector:
    """Chooses past keys by what queries and keys are. What carries it out is the mechanism named `kind`."""

    kind: ClassVar[str]
    options: ClassVar[dict[str, int]]  # names and defaults
    backends: ClassVar[tuple[str, ...]] = ("auto",)

    @classmethod
    def check(cls, options: dict[str, int]) -> None:
        """Raise an error for values of the options that are not valid."""
        raise NotImplementedError


class BlockSelector(Selector):
    """Chooses blocks of past keys by what the query is and a summary of each block says.

    Every query of a text chooses by itself among the blocks before its own, all of them complete: nothing depends on
    later tokens, and a token decoded sees what it would have seen in a prefill. Query heads that share a key/value head
    share a choice, that of the head with the highest score.
    """

    kind = "selected"
    options: ClassVar[dict[str, int]] = {"block_size": 64, "num_blocks": 16}
    backends = ("auto", "gathered", "masked", "reference")
    num_vectors: ClassVar[int]  # vectors of the key's size in the summary of a block

    @classmethod
    def check(cls, options: dict[str, int]) -> None:
        if options["block_size"] not in BLOCK_SIZES:
            raise ValueError(
                f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}; got {options['block_size']!r}"
            )
        whole_number("num_blocks", options["num_blocks"], FORCED)

    def summary(self, keys: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the summaries `[..., P, D]` of blocks of keys `[..., block_size, D]`, in float32.

        Args:
            real: Which of the keys there are, booleans `[..., block_size, 1]`.
        """
        raise NotImplementedError

    def extended(self, summary: torch.Tensor, key: torch.Tensor, is_first: torch.Tensor | bool) -> torch.Tensor:
        """Return the summary `[..., P, D]` of a block after one more key `[..., D]`.

        Args:
            is_first: Whether the block had no key before; broadcastable to the summary.
        """
        raise NotImplementedError

    def scores(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """Return how much queries `[B, G, T, D]` want blocks with summaries `[B, G, N, P, D]`: `[B, G, T, N]`; both
        float32."""
        raise NotImplementedError

    def chosen(self, scores: torch.Tensor, own: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Return the blocks each query meets `[B, G, T, num_blocks]`: the first, its own, and those with the highest
        scores in between; negative where there are fewer.

        Args:
            scores: `[B, G, T, N]`.
            own: The block each query is in `[B or 1, T]`.
        """
        block = torch.arange(scores.shape[3], device=scores.device)
        between = (block > 0) & (block < own[..., None])  # [B or 1, T, N]
        ranked = scores.masked_fill(~between[:, None], -torch.inf)
        best = ranked.topk(min(num_blocks - FORCED, scores.shape[3]), dim=3)
        found = best.indices.masked_fill(best.values == -torch.inf, -1)
        own = own[:, None, :, None].expand(*scores.shape[:3], 1)
        return torch.cat((torch.zeros_like(own), own.masked_fill(own == 0, -1), found), dim=3)
