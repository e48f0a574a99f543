"""Cutting a text into chunks that are computed at once, and back; heads that share keys as rows of one product."""

from __future__ import annotations

import torch
from torch.nn import functional


def fold(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Fold `[B, H, T, X]` into chunks `[B·N, H, C, X]`, the last one filled up with zeros."""
    batch, heads, tokens, width = x.shape
    missing = -tokens % chunk
    if missing:
        x = functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, chunk)).transpose(1, 2).reshape(-1, heads, chunk, width).contiguous()


def unfold(x: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """Undo `fold`: `[B·N, H, C, X]` to `[B, H, tokens, X]`."""
    heads, chunk, width = x.shape[1:]
    return x.view(batch, -1, heads, chunk, width).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def fold_marks(x: torch.Tensor | None, batch: int, chunk: int) -> torch.Tensor | None:
    """Fold what each token has, `[B or 1, T]`, into `[B·N, C]`, filled up with zeros."""
    if x is None:
        return None
    return functional.pad(x, (0, -x.shape[1] % chunk)).expand(batch, -1).reshape(-1, chunk)


def heads_as_rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return `[B, H, T, ·]` with the query heads of each of `groups` key/value heads as rows below each other,
    `[B, G, R·T, ·]`: larger products, and keys are read once for all of them."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[3:])


def read_by(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the key/value head of x `[B, G, S, D]` that each of the query heads reads, `[H]`."""
    return torch.arange(num_heads, device=x.device) // (num_heads // x.shape[1])
