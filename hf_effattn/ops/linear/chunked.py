"""Linear attention in chunks: quadratic inside a chunk of C tokens, a recurrent state between chunks.

A *segment* of several chunks is computed at once and segments follow each other, so scratch memory doesn't grow with
the text. The R query heads of a key/value head are folded into the rows of one matrix product (keys and values are
never repeated), the normaliser rides along as a column of ones, and the states before each chunk come from one product
with a triangular matrix.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...notation import compute_dtype
from ..collector import Collector
from .state import EPS, LinearOutput, LinearState, joined, split

SEGMENT_TOKENS = 1024


def with_ones(value: torch.Tensor) -> torch.Tensor:
    """Append the column of ones that turns the numerator's product into numerator and denominator: `[..., V+1]`."""
    return functional.pad(value, (0, 1), value=1.0)


def linear_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one segment of N whole chunks.

    Args:
        query: Mapped queries with the heads folded into rows, `[B·G, N, R·C, F]`, head-major rows.
        key: Mapped keys `[B·G, N, C, F]`.
        value: Values with their column of ones `[B·G, N, C, V+1]`.
        carry: Joined state before the segment `[B·G, F, V+1]`, float32.

    Returns:
        Numerators and denominators `[B·G, N, R·C, V+1]`, and the joined state after the segment.
    """
    batch, num_chunks, chunk, features = key.shape
    rows = query.shape[2]
    q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    chunk_states = torch.bmm(k.transpose(1, 2), v).to(carry.dtype).view(batch, num_chunks, -1)
    carry_and_states = torch.cat((carry.reshape(batch, 1, -1), chunk_states), dim=1)  # [B·G, N+1, F·(V+1)]
    triangle = carry.new_ones(num_chunks + 1, num_chunks + 1).tril()
    prefixes = torch.matmul(triangle, carry_and_states).view(batch, num_chunks + 1, features, -1)
    before = prefixes[:, :num_chunks].to(q.dtype).reshape(batch * num_chunks, features, -1)
    weights = torch.bmm(q, k.transpose(1, 2))  # [B·G·N, R·C, C]
    weights = weights.view(batch * num_chunks, rows // chunk, chunk, chunk).tril_()
    output = torch.baddbmm(torch.bmm(q, before), weights.view(batch * num_chunks, rows, chunk), v)
    return output.view(batch, num_chunks, rows, -1), prefixes[:, num_chunks]


def fold(x: torch.Tensor, kv_heads: int, chunk: int, length: int) -> torch.Tensor:
    """Fold `[B, H, T, X]` into `[B·G, N, R·C, X]`, zero-padded to N·C = `length` tokens."""
    batch, heads, tokens, width = x.shape
    if tokens < length:
        x = functional.pad(x, (0, 0, 0, length - tokens))
    groups, chunks = heads // kv_heads, length // chunk
    x = x.reshape(batch, kv_heads, groups, chunks, chunk, width).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * kv_heads, chunks, groups * chunk, width)


def unfold(x: torch.Tensor, kv_heads: int, chunk: int, tokens: int) -> torch.Tensor:
    """Undo `fold`: `[B·G, N, R·C, X]` to `[B, G, R, tokens, X]`."""
    folded, chunks, rows, width = x.shape
    x = x.view(folded // kv_heads, kv_heads, chunks, rows // chunk, chunk, width).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(*x.shape[:3], chunks * chunk, width)[..., :tokens, :]


def segments(length: int, chunk: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into segments of whole chunks (the last may be partial)."""
    size = max(chunk, SEGMENT_TOKENS // chunk * chunk)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, chunk_size: int
) -> LinearOutput:
    """Compute `O = tril(φQ φKᵀ) V + φQ S_prev` chunk by chunk; see `hf_effattn.ops.linear.linear_attention`."""
    batch, heads, tokens, _ = query.shape
    kv_heads, dtype = key.shape[1], compute_dtype(query.dtype)
    collector = Collector(query, value.shape[-1])
    carry = joined(state).flatten(0, 1)
    for start, end in segments(tokens, chunk_size):
        length = -(-(end - start) // chunk_size) * chunk_size
        q = fold(query[:, :, start:end].to(dtype), kv_heads, chunk_size, length)
        k = fold(key[:, :, start:end].to(dtype), kv_heads, chunk_size, length)
        v = fold(with_ones(value[:, :, start:end].to(dtype)), kv_heads, chunk_size, length)
        output, carry = linear_segment(q, k, v, carry)
        output = unfold(output, kv_heads, chunk_size, end - start).to(carry.dtype)
        normalised = output[..., :-1] / output[..., -1:].clamp(min=EPS)
        collector.add(normalised.reshape(batch, heads, end - start, -1).to(query.dtype))
    return LinearOutput(collector.result(), split(carry.view(batch, kv_heads, *carry.shape[1:])))
