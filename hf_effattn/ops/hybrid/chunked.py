"""Hybrid attention in chunks: per chunk a small softmax over its windows, and the linear past one window behind.

The linear part of query t sees the keys up to t − window. So it is ordinary causal linear attention over a stream of
keys that is late by one window, and the chunk core of `ops.linear` serves it unchanged. The feature maps are applied
segment by segment: scratch memory doesn't grow with the text.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...notation import compute_dtype
from ..collector import Collector
from ..linear import LinearOutput, LinearState
from ..linear.chunked import fold, linear_segment, segments, unfold, with_ones
from ..linear.state import joined, split
from ..sparse.masked import attend_causal
from ..stream import Stream
from .merge import merge
from .options import HybridOptions


def hybrid_attention(
    query: torch.Tensor, stream: Stream, state: LinearState, options: HybridOptions, lengths: torch.Tensor | None
) -> LinearOutput:
    """Compute segment by segment; arguments as in `hf_effattn.ops.hybrid.hybrid_attention`."""
    batch, heads, tokens, _ = query.shape
    kv_heads, chunk = stream.key.shape[1], options.chunk_size
    past = stream.key.shape[2] - tokens
    if past == 0 and tokens <= options.window:  # nothing has left the window yet: softmax attention, exactly
        return LinearOutput(attend_causal(query, stream.key, stream.value, options.scale), state)
    dtype = compute_dtype(query.dtype)
    collector = Collector(query, stream.value.shape[-1])
    carry = joined(state).flatten(0, 1)
    for start, end in segments(tokens, chunk):
        length = -(-(end - start) // chunk) * chunk
        low = past + start - options.window  # stream index of the first query's far key
        key, value = (_take(x, low, past + end, options.window + length) for x in (stream.key, stream.value))
        plain = stream.least + low >= options.num_sinks
        real = None if plain else stream.positions(low, low + options.window + length) >= options.num_sinks
        q = query[:, :, start:end]
        folded = fold(q.to(dtype), kv_heads, chunk, length)
        near = _window(folded, key.to(dtype), value.to(dtype), stream, real, past + start, options)
        features = options.key_map(key[:, :, :length]).to(dtype)
        arrived = _arrived(real, lengths, start, length, end - start)
        if arrived is not None:
            features = features * arrived[:, None, :, None].to(dtype)
        far, carry = linear_segment(
            fold(options.query_map(q).to(dtype), kv_heads, chunk, length),
            fold(features, kv_heads, chunk, length),
            fold(with_ones(value[:, :, :length].to(dtype)), kv_heads, chunk, length),
            carry,
        )
        output = _merge_parts(near, far, options.bias, batch, kv_heads, chunk)
        output = unfold(output, kv_heads, chunk, end - start)
        collector.add(output.view(batch, heads, end - start, -1).to(query.dtype))
    return LinearOutput(collector.result(), split(carry.view(batch, kv_heads, *carry.shape[1:])))


def _take(x: torch.Tensor, low: int, high: int, length: int) -> torch.Tensor:
    """Entries low..high of `x` `[B, G, S, X]` with zeros before the first (low may be negative) and up to `length`."""
    left, part = max(0, -low), x[:, :, max(0, low) : high]
    right = length - left - part.shape[2]
    return functional.pad(part, (0, 0, left, right)) if left or right else part


def _arrived(
    real: torch.Tensor | None, lengths: torch.Tensor | None, start: int, length: int, tokens: int
) -> torch.Tensor | None:
    """Which far keys `[B or 1, length]` enter the linear state: real ones, and only for queries that are real."""
    arrived = None if real is None else real[:, :length]
    if lengths is not None:
        index = torch.arange(start, start + length, device=lengths.device)
        counted = index < lengths[:, None]
        arrived = counted if arrived is None else arrived & counted
    if tokens < length:  # the zeros behind the last token are no far keys either
        device = arrived.device if arrived is not None else None
        exists = (torch.arange(length, device=device) < tokens)[None]
        arrived = exists if arrived is None else arrived & exists
    return arrived


def _window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stream: Stream,
    real: torch.Tensor | None,
    first: int,
    options: HybridOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over window and sinks: numerator `[B·G, N, R·C, V]`, denominator and maximum `[B·G, N, R·C, 1]`.

    Args:
        query: Folded `[B·G, N, R·C, D]`.
        key, value: `[B, G, window + N·C, ·]`, from one window before the first query.
        real: Which of these are visible at all `[B or 1, window + N·C]`; None for all.
        first: Stream index of the first query.
    """
    chunk, window = options.chunk_size, options.window
    folded, chunks, rows, _ = query.shape
    batch = key.shape[0]
    keys = key.unfold(2, window + chunk, chunk).flatten(0, 1)  # [B·G, N, D, W+C]
    values = value.unfold(2, window + chunk, chunk).flatten(0, 1).transpose(2, 3)  # [B·G, N, W+C, V]
    scores = torch.matmul(query, keys).float() if query.dtype == torch.bfloat16 else torch.matmul(query, keys)
    scores = (scores * options.scale).view(batch, -1, chunks, rows // chunk, chunk, window + chunk)
    i = torch.arange(chunk, device=query.device)[:, None]
    j = torch.arange(window + chunk, device=query.device)
    hidden = ((j <= i) | (j > i + window))[None, None, None, None]  # [1, 1, 1, 1, C, W+C]
    if real is not None:
        hidden = hidden | ~real.unfold(1, window + chunk, chunk)[:, None, :, None, None, :]
    scores = scores.masked_fill(hidden, -torch.inf).view(folded, chunks, rows, -1)
    sink_key, sink_value = stream.sinks(options.num_sinks)
    if sink_key.shape[2]:
        sinks = _sink_scores(query, sink_key, stream, first, options)
        scores = torch.cat((sinks, scores), dim=-1)
    peak = scores.detach().amax(dim=-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - peak).exp()
    denominator = weights.sum(dim=-1, keepdim=True)
    weights = weights.to(value.dtype)
    split_at = sink_key.shape[2]
    numerator = torch.matmul(weights[..., split_at:], values)
    if split_at:
        v = sink_value.to(value.dtype).flatten(0, 1)[:, None]  # [B·G, 1, sinks, V]
        numerator = numerator + torch.matmul(weights[..., :split_at], v)
    return numerator, denominator, peak


def _sink_scores(
    query: torch.Tensor, sink_key: torch.Tensor, stream: Stream, first: int, options: HybridOptions
) -> torch.Tensor:
    """Scores of the sinks `[B·G, N, R·C, sinks]`, minus infinity where a query comes before a sink."""
    folded, chunks, rows, _ = query.shape
    chunk, num_sinks = options.chunk_size, sink_key.shape[2]
    scores = torch.matmul(query, sink_key.to(query.dtype).flatten(0, 1)[:, None].transpose(2, 3)) * options.scale
    if query.dtype == torch.bfloat16:
        scores = scores.float()
    if stream.least + first >= num_sinks:
        return scores
    positions = stream.positions(first, first + chunks * chunk).view(-1, 1, chunks, 1, chunk, 1)
    early = torch.arange(num_sinks, device=query.device) > positions
    scores = scores.view(sink_key.shape[0], -1, chunks, rows // chunk, chunk, num_sinks)
    return scores.masked_fill(early, -torch.inf).view(folded, chunks, rows, num_sinks)


def _merge_parts(
    near: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    far: torch.Tensor,
    bias: torch.Tensor,
    batch: int,
    kv_heads: int,
    chunk: int,
) -> torch.Tensor:
    """Merge both parts of a segment, folded `[B·G, N, R·C, ·]`."""
    wide = near[1].dtype
    rows = bias.to(wide).view(kv_heads, -1).repeat_interleave(chunk, dim=1)  # [G, R·C]
    rows = rows.repeat(batch, 1)[:, None, :, None]  # [B·G, 1, R·C, 1]
    numerator, denominator, peak = near
    return merge(numerator.to(wide), denominator, peak, far[..., :-1].to(wide), far[..., -1:].to(wide), rows)
