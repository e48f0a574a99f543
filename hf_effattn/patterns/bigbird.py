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

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own, other = (torch.div(x, block_size, rounding_mode="floor") for x in (q, k))
        visible = (own - other < WINDOW) | (other == 0)
        if num_random:
            visible = visible | (drawn(h, own) == other).any(dim=0)
        return (k <= q) & visible

    @functools.lru_cache(maxsize=1)  # the tokens that are decoded in one block ask for the same
    def inside_drawn(block: int, num_heads: int) -> torch.Tensor:
        """Positions in the random blocks of one block of queries, `[H, n]`."""
        blocks = drawn(torch.arange(num_heads), torch.tensor(block)).T[..., None]
        return (blocks * block_size + torch.arange(block_size)).masked_fill(blocks < 0, -1).flatten(1)

    def by_head(start: int, stop: int, num_heads: int) -> torch.Tensor:
        block = start // block_size
        near = torch.arange(max(block - WINDOW + 1, 0) * block_size, stop)
        first = torch.arange(block_size if block >= WINDOW else 0)
        fixed = torch.cat((first, near)).expand(num_heads, -1)
        return torch.cat((fixed, inside_drawn(block, num_heads)), dim=1) if num_random else fixed

    part = Part(mask_mod, lambda start, stop: [], block_size=block_size, by_head=by_head, exact=True)
    return Pattern(mask_mod, Retention(), parts=(part,))
