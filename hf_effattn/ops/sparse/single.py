"""Sparse attention of single queries that reads the keys they see and no others: decoding, where all keys are kept.

The masked backend would read every key, and a mask as long. The parts of a pattern tell where the few are that matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...patterns import Pattern
from ..folding import read_by
from .jobs import distinct, ranges_of
from .masked import attend

LEAST_SLOTS = 1024  # from which on it pays to find the keys and copy them


class Seen(NamedTuple):
    """What one query sees.

    Args:
        keys: Positions `[n]`, or `[H, n]` where heads differ.
        shown: Which of them a head sees, booleans `[1, H, 1, n]`; None for all.
    """

    keys: torch.Tensor
    shown: torch.Tensor | None = None


def sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, position: int, scale: float
) -> torch.Tensor:
    """Compute attention of the query `[B, H, 1, D]` at `position` over key `[B, G, S, D]` and value `[B, G, S, V]`,
    whose slot j holds position j; a query that sees no key gets zero."""
    seen = seen_by(pattern, position, query.shape[1], query.device)
    if not seen.keys.numel():
        return query.new_zeros(*query.shape[:3], value.shape[3])
    if seen.keys.ndim == 1:
        k, v = (x.index_select(2, seen.keys) for x in (key, value))
    else:
        index = (seen.keys + read_by(key, query.shape[1])[:, None] * key.shape[2]).flatten()
        k, v = (x.flatten(1, 2).index_select(1, index).unflatten(1, seen.keys.shape) for x in (key, value))
    if seen.shown is None:
        return attend(query, k, v, None, scale)
    blind = ~seen.shown.any(dim=-1, keepdim=True)
    return attend(query, k, v, seen.shown | blind, scale).masked_fill(blind, 0.0)


def seen_by(pattern: Pattern, position: int, num_heads: int, device: torch.device) -> Seen:
    """Return what the query at `position` sees of a pattern that has parts."""
    ranges = [each for part in pattern.parts for each in ranges_of(part, position, position + 1)]
    by_head = [part.by_head(position, position + 1, num_heads) for part in pattern.parts if part.by_head is not None]
    found = [torch.arange(*each, device=device) for each in ranges] + [each.to(device) for each in by_head]
    if by_head:
        keys = torch.cat([x.expand(num_heads, -1) for x in found], dim=1)
    else:
        keys = torch.cat(found or [torch.arange(0, device=device)])
    if all(part.exact for part in pattern.parts):  # then it sees each, and each is there once
        return Seen(keys)
    keys = distinct(keys) if by_head else keys.unique()
    at_keys = keys.view(1, -1, 1, keys.shape[-1])
    at = torch.full((1, 1, 1, 1), position, device=device)
    heads = torch.arange(num_heads, device=device)[None, :, None, None]
    shown = pattern.mask_mod(0 * at, heads, at, at_keys) & (at_keys >= 0)
    if shown.shape[1] == 1:
        return Seen(keys[shown.flatten()])
    if not by_head:  # what nobody sees goes
        anyone = shown.any(dim=1).flatten()
        keys, shown = keys[anyone], shown[..., anyone]
    return Seen(keys) if bool(shown.all()) else Seen(keys.clamp(min=0), shown)
