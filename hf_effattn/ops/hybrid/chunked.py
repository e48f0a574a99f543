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
from .merge import linear_logit, linear_value
from .options import HybridOptions


def hybrid_attention(
    query: torch.Tensor, stream: Stream, state: LinearState, options: HybridOptions, lengths: torch.Tensor | None
) -> LinearOutput:
    """Compute segment by segment; arguments as in `hf_effattn.ops.hybrid.hybrid_attention`."""
    batch, heads, tokens, _ = query.shape
    kv_heads, chunk = stream.key.shape[1], options.chunk_size
    past = stream.key.shape[2] - tokens
    if past == 0 and tokens <= options.window:  # nothing has left the window yet: softmax attention, exactly
        plain_query, plain_key = options.scored(query), options.scored(stream.key)
        return LinearOutput(attend_causal(plain_query, plain_key, stream.value, options.scale), state)
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
        folded = fold(options.scored(q).to(dtype), kv_heads, chunk, length)
        here = key_at = None
        if options.uses_positions:
            here, key_at = stream.positions(past + start, past + end), stream.positions(low, low + length)
        features = options.key_map(key[:, :, :length], key_at).to(dtype)
        arrived = _arrived(real, lengths, start, length)
        if arrived is not None:
            features = features * arrived[:, None, :, None].to(dtype)
        if end - start < length:  # what stands behind the last token's far key is none
            features = functional.pad(features[:, :, : end - start], (0, 0, 0, length - (end - start)))
        far, carry = linear_segment(
            fold(options.query_map(q, here).to(dtype), kv_heads, chunk, length),
            fold(features, kv_heads, chunk, length),
            fold(with_ones(value[:, :, :length].to(dtype)), kv_heads, chunk, length),
            carry,
        )
        output = _join(
            folded,
            options.scored(key).to(dtype),
            value.to(dtype),
            far.to(carry.dtype),
            stream,
            real,
            past + start,
            options,
        )
        output = unfold(output, kv_heads, chunk, end - start)
        collector.add(output.reshape(batch, heads, end - start, -1).to(query.dtype))
    return LinearOutput(collector.result(), split(carry.view(batch, kv_heads, *carry.shape[1:])))


def _take(x: torch.Tensor, low: int, high: int, length: int) -> torch.Tensor:
    """Entries low..high of `x` `[B, G, S, X]` with zeros before the first (low may be negative) and up to `length`."""
    left, part = max(0, -low), x[:, :, max(0, low) : high]
    right = length - left - part.shape[2]
    return functional.pad(part, (0, 0, left, right)) if left or right else part


def _arrived(real: torch.Tensor | None, lengths: torch.Tensor | None, start: int, length: int) -> torch.Tensor | None:
    """Which far keys `[B or 1, length]` enter the linear state: real ones, and only for queries that are real."""
    arrived = None if real is None else real[:, :length]
    if lengths is not None:
        index = torch.arange(start, start + length, device=lengths.device)
        counted = index < lengths[:, None]
        arrived = counted if arrived is None else arrived & counted
    return arrived


def _join(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    far: torch.Tensor,
    stream: Stream,
    real: torch.Tensor | None,
    first: int,
    options: HybridOptions,
) -> torch.Tensor:
    """One softmax over window, sinks and the linear past: output `[B·G, N, R·C, V]`.

    Args:
        query: Folded `[B·G, N, R·C, D]`.
        key, value: `[B, G, window + N·C, ·]`, from one window before the first query.
        far: Numerators and denominators of the linear past `[B·G, N, R·C, V+1]`, float32.
        real: Which keys are visible at all `[B or 1, window + N·C]`; None for all.
        first: Stream index of the first query.
    """
    batch, kv_heads, span = key.shape[0], key.shape[1], options.window + options.chunk_size
    keys = key.unfold(2, span, options.chunk_size).flatten(0, 1)  # [B·G, N, D, W+C]
    values = value.unfold(2, span, options.chunk_size).flatten(0, 1).transpose(2, 3)  # [B·G, N, W+C, V]
    scores = torch.matmul(query, keys).to(far.dtype) * options.scale
    scores = _hide(scores, batch, real, options)
    sink_key, sink_value = stream.sinks(options.num_sinks)
    parts = [scores, linear_logit(far[..., -1:], _folded_bias(options, batch, kv_heads, far.dtype))]
    if sink_key.shape[2]:
        parts.insert(1, _sink_scores(query, sink_key, stream, first, options).to(far.dtype))
    weights = torch.cat(parts, dim=-1).softmax(dim=-1)
    output = torch.matmul(weights[..., :span].to(query.dtype), values).to(far.dtype)
    if sink_key.shape[2]:
        v = sink_value.to(query.dtype).flatten(0, 1)[:, None]  # [B·G, 1, sinks, V]
        output = output + torch.matmul(weights[..., span:-1].to(query.dtype), v)
    return output + weights[..., -1:] * linear_value(far[..., :-1], far[..., -1:])


def _hide(scores: torch.Tensor, batch: int, real: torch.Tensor | None, options: HybridOptions) -> torch.Tensor:
    """Hide what is no key of its query's window, in scores `[B·G, N, R·C, W+C]`."""
    chunk, window = options.chunk_size, options.window
    folded, chunks, rows, span = scores.shape
    i = torch.arange(chunk, device=scores.device)[:, None]
    j = torch.arange(span, device=scores.device)
    hidden = ((j <= i) | (j > i + window))[None, None, None, None]  # [1, 1, 1, 1, C, W+C]
    if real is not None:
        hidden = hidden | ~real.unfold(1, span, chunk)[:, None, :, None, None, :]
    return scores.view(batch, -1, chunks, rows // chunk, chunk, span).masked_fill(hidden, -torch.inf).view_as(scores)


def _folded_bias(options: HybridOptions, batch: int, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """The bias of each folded row, `[B·G, 1, R·C, 1]`."""
    rows = options.bias.to(dtype).view(kv_heads, -1).repeat_interleave(options.chunk_size, dim=1)
    return rows.repeat(batch, 1)[:, None, :, None]


def _sink_scores(
    query: torch.Tensor, sink_key: torch.Tensor, stream: Stream, first: int, options: HybridOptions
) -> torch.Tensor:
    """Scores of the sinks `[B·G, N, R·C, sinks]`, minus infinity where a query comes before a sink."""
    folded, chunks, rows, _ = query.shape
    chunk, num_sinks = options.chunk_size, sink_key.shape[2]
    scores = (
        torch.matmul(query, options.scored(sink_key).to(query.dtype).flatten(0, 1)[:, None].transpose(2, 3))
        * options.scale
    )
    if stream.least + first >= num_sinks:
        return scores
    positions = stream.positions(first, first + chunks * chunk).view(-1, 1, chunks, 1, chunk, 1)
    early = torch.arange(num_sinks, device=query.device) > positions
    scores = scores.view(sink_key.shape[0], -1, chunks, rows // chunk, chunk, num_sinks)
    return scores.masked_fill(early, -torch.inf).view(folded, chunks, rows, num_sinks)
