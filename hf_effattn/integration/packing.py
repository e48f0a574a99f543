"""Documents packed into one row: where positions, or the lengths that flash kernels get, say that they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def documents_of(positions: torch.Tensor | None, real: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return the documents that positions tell by beginning anew, as segments; None if there is one a row.

    For families that know packing by nothing else: transformers looks at positions where it makes masks, but not all
    models hand them over, and none looks at them where there is a mask.

    Args:
        positions: Of the tokens `[B or 1, T]`.
        real: Which tokens are no padding `[B, T]`, booleans; None for all.
    """
    if positions is None or positions.ndim != 2 or positions.shape[1] == 1:
        return None
    if not torch.compiler.is_compiling() and bool((positions.diff(dim=1) > 0).all()):
        return None  # as mostly, and known at once
    if real is None:
        real = torch.ones_like(positions, dtype=torch.bool)
    positions = positions.expand(real.shape[0], -1)
    index = torch.arange(positions.shape[1], device=positions.device)
    latest = torch.where(real, index, -1).cummax(dim=1).values  # last real token up to and including each
    before = functional.pad(latest[:, :-1], (1, 0), value=-1)
    begins = real & (before >= 0) & (positions <= positions.gather(1, before.clamp(min=0)))
    if torch.compiler.is_compiling():  # a graph cannot depend on where documents begin
        torch._assert_async(
            ~begins.any(), "compiled or exported, models of this family take one document a row: position_ids must grow"
        )
        return None
    return (1 + begins.long().cumsum(dim=1)) * real if bool(begins.any()) else None


def read_lengths(
    segments: torch.Tensor | None, of_queries: Any, of_keys: Any, query: torch.Tensor
) -> torch.Tensor | None:
    """Read `cu_seq_lens_q` and `cu_seq_lens_k`, by which collators tell flash kernels where documents begin, as
    segments.

    Args:
        segments: What the mask says, as `read_mask` returns it; padding stays padding.
        of_queries: Tokens before each document, and in the end all: `[0, n₁, n₁ + n₂, …, T]`.
        of_keys: The same.
        query: `[B, H, T, D]`, for its shape and device; B must be 1.

    Returns:
        As `read_mask`.

    Raises:
        ValueError: unless both are there and the same, for other numbers than these, for more than one row, or if
            documents begin elsewhere by `position_ids` or the mask.
    """
    batch, _, tokens, _ = query.shape
    if not all(isinstance(x, torch.Tensor) and x.ndim == 1 for x in (of_queries, of_keys)) or batch != 1:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must both be given, as tensors of one dimension, or none of them, and for "
            f"documents packed into one row; got {type(of_queries).__name__}, {type(of_keys).__name__} and {batch} rows"
        )
    is_one = len(of_queries) == 2
    if not torch.compiler.is_compiling():
        numbers = of_queries.tolist()
        is_one = len({*numbers}) == 2
        if numbers != of_keys.tolist() or numbers[:1] != [0] or numbers[-1:] != [tokens] or numbers != sorted(numbers):
            raise ValueError(
                f"cu_seq_lens_q and cu_seq_lens_k must be the same numbers that grow from 0 to T = {tokens}; got "
                f"{numbers} and {of_keys.tolist()}"
            )
    ends = of_queries.to(query.device)
    segment_ids = torch.bucketize(torch.arange(tokens, device=ends.device), ends[1:], right=True)[None] + 1
    if segments is None or segments.dtype == torch.bool:
        return segments if is_one else segment_ids if segments is None else segment_ids * segments
    if not torch.compiler.is_compiling():
        both = (segments[:, 1:] > 0) & (segments[:, :-1] > 0)
        if not torch.equal(*((x.diff(dim=1) != 0) & both for x in (segments, segment_ids))):
            raise ValueError("by cu_seq_lens_q documents begin elsewhere than by position_ids or the mask")
    return segments
