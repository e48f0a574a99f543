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
from ..folding import fold, unfold
from ..linear import LinearOutput, LinearState
from ..linear.chunked import read_segment
from ..linear.segment import fold_segment, segments
from ..sparse.masked import attend_causal
from ..stream import Stream
from .merge import linear_logit
from .options import HybridOptions


def hybrid_attention(
    query: torch.Tensor, stream: Stream, state: LinearState, options: HybridOptions, lengths: torch.Tensor | None
) -> LinearOutput:
    """Compute segment by segment; arguments as in `hf_effattn.ops.hybrid.hybrid_attention`."""
    batch, heads, tokens, _ = query.shape
    chunk = options.chunk_size
    past = stream.key.shape[2] - tokens
    if past == 0 and tokens <= options.window:  # nothing has left the window yet: softmax attention, exactly
        plain_query, plain_key = options.scored(query), options.scored(stream.key)
        return LinearOutput(attend_causal(plain_query, plain_key, stream.value, options.scale), state)
    dtype = compute_dtype(query.dtype)
    collector = Collector(query, stream.value.shape[-1])
    carry = state.sums
    for start, end in segments(query, chunk):
        length = -(-(end - start) // chunk) * chunk
        low = past + start - options.window  # stream index of the first query's far key
        key, value = (_take(x, low, past + end, options.window + length) for x in (stream.key, stream.value))
        plain = stream.least + low >= options.num_sinks
        real = None if plain else stream.positions(low, low + options.window + length) >= options.num_sinks
        q = query[:, :, start:end]
        tokens_at = stream.positions(low, past + end) if options.uses_positions else None
        plan = options.plan(
            None if tokens_at is None else tokens_at[:, options.window :],
            None if tokens_at is None else tokens_at[:, : end - start],
            _arrived(real, lengths, start, end - start),
        )
        segment = fold_segment(q, key[:, :, : end - start], value[:, :, : end - start], plan)
        far, carry = read_segment(segment, carry)
        far = far.to(carry.dtype)
        folded = fold(options.scored(q).to(dtype), chunk).view(*far.shape[:3], -1)
        output = _join(folded, options.scored(key).to(dtype), value.to(dtype), far, stream, real, past + start, options)
        collector.add(unfold(output.view(-1, heads, chunk, output.shape[-1]), batch, end - start))
    return LinearOutput(collector.result(), LinearState(carry))


def _take(x: torch.Tensor, low: int, high: int, length: int) -> torch.Tensor:
    """Entries low..high of `x` `[B, G, S, X]` with zeros before the first (low may be negative) and up to `length`."""
    left, part = max(0, -low), x[:, :, max(0, low) : high]
    right = length - left - part.shape[2]
    return functional.pad(part, (0, 0, left, right)) if left or right else part


def _arrived(real: torch.Tensor | None, lengths: torch.Tensor | None, start: int, tokens: int) -> torch.Tensor | None:
    """Which far keys `[B or 1, tokens]` enter the linear state: real ones, and only for queries that are real."""
    arrived = None if real is None else real[:, :tokens]
    if lengths is not None:
        index = torch.arange(start, start + tokens, device=lengths.device)
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
    """One softmax over window, sinks and the linear past: output `[B·N, G, R·C, V]`.

    Args:
        query: Folded `[B·N, G, R·C, D]`.
        key, value: `[B, G, window + N·C, ·]`, from one window before the first query.
        far: Numerators and denominators of the linear past `[B·N, G, R·C, V+1]`, float32.
        real: Which keys are visible at all `[B or 1, window + N·C]`; None for all.
        first: Stream index of the first query.
    """
    span, batch = options.window + options.chunk_size, key.shape[0]
    keys, values = (x.unfold(2, span, options.chunk_size).transpose(1, 2).flatten(0, 1) for x in (key, value))
    scores = torch.matmul(query, keys).to(far.dtype) * options.scale  # keys are [B·N, G, D, W+C]
    scores = _hide(scores, batch, real, options)
    sink_key, sink_value = stream.sinks(options.num_sinks)
    if sink_key.shape[2]:
        scores = torch.cat((scores, _sink_scores(query, sink_key, stream, first, options).to(far.dtype)), dim=-1)
    bias = _folded_bias(options, query.shape[1], far.dtype)
    logit = linear_logit(far[..., -1:], bias, scores, options.join)
    weights = torch.cat((scores, logit), dim=-1).softmax(dim=-1)
    output = torch.matmul(weights[..., :span].to(query.dtype), values.transpose(2, 3)).to(far.dtype)
    if sink_key.shape[2]:
        of_sinks = weights[..., span:-1].to(query.dtype).view(batch, -1, *weights.shape[1:3], sink_key.shape[2])
        output = output + torch.matmul(of_sinks, sink_value.to(query.dtype)[:, None]).view(output.shape)
    return output + weights[..., -1:] * options.linear_value(far)


def _hide(scores: torch.Tensor, batch: int, real: torch.Tensor | None, options: HybridOptions) -> torch.Tensor:
    """Hide what is no key of its query's window, in scores `[B·N, G, R·C, W+C]`."""
    chunk, window = options.chunk_size, options.window
    span = window + chunk
    i = torch.arange(chunk, device=scores.device)[:, None]
    j = torch.arange(span, device=scores.device)
    hidden = ((j <= i) | (j > i + window))[None, None, None]  # [1, 1, 1, C, W+C]
    if real is not None:
        hidden = hidden | ~real.unfold(1, span, chunk)[:, :, None, None]
    return scores.view(batch, scores.shape[0] // batch, -1, chunk, span).masked_fill(hidden, -torch.inf).view_as(scores)


def _folded_bias(options: HybridOptions, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """The bias of each folded row, `[1, G, R·C, 1]`."""
    return options.bias.to(dtype).view(kv_heads, -1).repeat_interleave(options.chunk_size, dim=1)[None, :, :, None]


def _sink_scores(
    query: torch.Tensor, sink_key: torch.Tensor, stream: Stream, first: int, options: HybridOptions
) -> torch.Tensor:
    """Scores of the sinks `[B·N, G, R·C, sinks]`, minus infinity where a query comes before a sink."""
    batch, chunk, num_sinks = sink_key.shape[0], options.chunk_size, sink_key.shape[2]
    chunks = query.shape[0] // batch
    keys = options.scored(sink_key).to(query.dtype)[:, None].transpose(3, 4)  # [B, 1, G, D, sinks]
    scores = torch.matmul(query.view(batch, chunks, *query.shape[1:]), keys) * options.scale
    if stream.least + first < num_sinks:
        positions = stream.positions(first, first + chunks * chunk).view(-1, chunks, 1, 1, chunk, 1)
        early = torch.arange(num_sinks, device=query.device) > positions
        scores = scores.view(batch, chunks, query.shape[1], -1, chunk, num_sinks).masked_fill(early, -torch.inf)
    return scores.view(*query.shape[:3], num_sinks)
