"""The random blocks of BigBird, causal."""

from __future__ import annotations

import functools

import torch

from ..notation import whole_number
from .base import Pattern, register_pattern
from .parts import Part
from .retention import Retention

WINDOW = 3  # blocks: the query's own and two before
MIX = 0x45D9F3B


@register_pattern("bigbird")
def bigbird(block_size: int = 64, num_random: int = 3, seed: int = 0) -> Pattern:
    """The own block, the two before, the first, and `num_random` random ones in between, for each head and block of
    `block_size` queries (BigBird, arXiv 2007.14062, causal).

    Which blocks are drawn is a function of seed, head and block alone, so that decoding, a reloaded model and a resumed
    training see the same. What lies between is cut into `num_random` equal stretches, and each gives one block. Any
    block may be drawn again, so a cache keeps every key.

    Args:
        block_size: Tokens of one block.
        num_random: Random blocks of each block of queries.
        seed: Of the draw. Converted layers get seeds that differ: their index is added.
    """
    whole_number("block_size", block_size, 1)
    whole_number("num_random", num_random, 0)
    whole_number("seed", seed, 0)

    def drawn(h: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Random blocks of query blocks `block`, negative where there is none: `[num_random, ...]`."""
        index = torch.arange(num_random, device=block.device).view(-1, *(1,) * max(h.ndim, block.ndim))
        free = (block - WINDOW).clamp(min=0)  # blocks 1 .. block − WINDOW
        low, high = (torch.div(free * (index + i), num_random, rounding_mode="floor") for i in (0, 1))
        mixed = (((seed * 1_000_003 + h) * 1_000_033 + block) * 1_000_037 + index) & 0x7FFFFFFF
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 16)) * MIX) & 0x7FFFFFFF
        mixed = mixed ^ (mixed >> 16)
        chosen = 1 + low + mixed % (high - low).clamp(min=1)
        return chosen.masked_fill(high <= low, -1)

    def block_of(x: torch.Tensor) -> torch.Tensor:
        return torch.div(x, block_size, rounding_mode="floor")

    def is_near(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (block_of(q) - block_of(k) < WINDOW)

    def is_far(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own, other = block_of(q), block_of(k)
        visible = other == 0
        if num_random:
            visible = visible | (drawn(h, own) == other).any(dim=0)
        return (own - other >= WINDOW) & visible

    @functools.lru_cache(maxsize=1)  # the tokens that are decoded in one block ask for the same
    def far(block: int, num_heads: int) -> torch.Tensor:
        """Positions in the first and the random blocks of one block of queries, `[H, n]`."""
        blocks = torch.zeros(num_heads, 1 if block >= WINDOW else 0, dtype=torch.int64)
        if num_random:
            random = drawn(torch.arange(num_heads), torch.tensor(block)).T
            blocks = torch.cat((blocks, random[:, random[0] >= 0]), dim=1)  # of all heads as many
        return (blocks[..., None] * block_size + torch.arange(block_size)).flatten(1)

    return Pattern(
        lambda b, h, q, k: is_near(b, h, q, k) | is_far(b, h, q, k),
        Retention(),
        parts=(
            Part(
                is_near,
                lambda start, stop: [((start // block_size - WINDOW + 1) * block_size, stop, 1)],
                block_size=block_size,
                exact=True,
            ),
            Part(
                is_far,
                lambda start, stop: [],
                block_size=block_size,
                by_head=lambda start, stop, num_heads: far(start // block_size, num_heads),
                exact=True,
            ),
        ),
    )
