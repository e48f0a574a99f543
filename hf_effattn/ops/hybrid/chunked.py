"""Hybrid attention in chunks: per chunk a small softmax over its windows, and the linear past one window behind.

The linear part of query t sees the keys up to t − window. So it is ordinary causal linear attention over a stream of
keys that is late by one window, and the chunk core of `ops.linear` serves it unchanged. The feature maps are applied
segment by segment: scratch memory doesn't grow with the text.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...notation import by_row, compute_dtype
from ..blocks import Blocks, Tensors, in_blocks
from ..folding import fold, unfold
from ..linear import LinearOutput, LinearState
from ..linear.chunked import read_segment
from ..linear.segment import SEGMENT_BYTES, fold_segment, segments
from ..sparse.masked import attend_causal
from ..stream import Stream
from .join import joined
from .logit import linear_logit
from .options import HybridOptions

Computed = tuple[torch.Tensor, torch.Tensor]  # output and state
LEARNING_BYTES = 1024  # as SEGMENT_BYTES, but the backward pass needs more for each token than the forward pass


def hybrid_attention(
    query: torch.Tensor, stream: Stream, state: LinearState, options: HybridOptions, lengths: torch.Tensor | None
) -> LinearOutput:
    """Compute segment by segment; arguments as in `hf_effattn.ops.hybrid.hybrid_attention`."""
    tokens, chunk = query.shape[2], options.chunk_size
    past = stream.key.shape[2] - tokens
    if past == 0 and tokens <= options.window:  # nothing has left the window yet: softmax attention, exactly
        plain_query, plain_key = options.scored(query), options.scored(stream.key)
        return LinearOutput(attend_causal(plain_query, plain_key, stream.value, options.scale), state)
    learns = torch.is_grad_enabled()
    cuts = segments(query, chunk, LEARNING_BYTES if learns else SEGMENT_BYTES)
    ranges = []
    for start, end in cuts:
        keys = (max(past + start - options.window, 0), past + end)  # from the first query's far key on
        ranges.append(((start, end), keys, keys))

    def compute(block: int, carry: torch.Tensor | None, parts: Tensors, shared: Tensors) -> Computed:
        assert carry is not None
        own = stream._replace(sink_key=shared[0], sink_value=shared[1])
        return _segment(cuts[block], carry, parts, own, options._replace(bias=shared[2]), lengths, past)

    blocks = Blocks(compute, ranges, options.modules, stream.value.shape[-1])
    shared = (*stream.sinks(options.num_sinks), options.bias)
    output, carry = in_blocks(blocks, state.sums, (query, stream.key, stream.value), shared)
    assert carry is not None
    return LinearOutput(output, LinearState(carry))


def _segment(
    cut: tuple[int, int],
    carry: torch.Tensor,
    parts: Tensors,
    stream: Stream,
    options: HybridOptions,
    lengths: torch.Tensor | None,
    past: int,
) -> Computed:
    """Return the output `[B, H, t, V]` of one segment and the linear state after it.

    Args:
        cut: Its first query, and the one behind its last.
        carry: The linear state before it.
        parts: Its queries, and its keys and values from one window before them on, as far as there are any.
        stream: For sinks and positions.
        past: Stream index of the first query of the text.
    """
    (start, end), (query, key, value), chunk = cut, parts, options.chunk_size
    length, low, dtype = -(-(end - start) // chunk) * chunk, past + start - options.window, compute_dtype(query.dtype)
    key, value = (_filled(x, max(0, -low), options.window + length) for x in (key, value))
    plain = stream.least + low >= options.num_sinks
    real = None if plain else stream.positions(low, low + options.window + length) >= options.num_sinks
    tokens_at = stream.positions(low, past + end) if options.uses_positions else None
    plan = options.plan(
        None if tokens_at is None else tokens_at[:, options.window :],
        None if tokens_at is None else tokens_at[:, : end - start],
        _arrived(real, lengths, start, end - start),
    )
    segment = fold_segment(query, key[:, :, : end - start], value[:, :, : end - start], plan)
    far, carry = read_segment(segment, carry)
    far = far.to(carry.dtype)
    folded = fold(options.scored(query).to(dtype), chunk).view(*far.shape[:3], -1)
    output = _join(folded, options.scored(key).to(dtype), value.to(dtype), far, stream, real, past + start, options)
    output = unfold(output.view(-1, query.shape[1], chunk, output.shape[-1]), query.shape[0], end - start)
    return output.to(query.dtype), carry


def _filled(x: torch.Tensor, left: int, length: int) -> torch.Tensor:
    """x `[B, G, S, X]` with `left` zeros before it, and zeros behind it up to `length`."""
    right = length - left - x.shape[2]
    return functional.pad(x, (0, 0, left, right)) if left or right else x


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
    sinks = stream.sinks(options.num_sinks)
    hidden = _hidden(query, sinks[0].shape[2], stream, real, first, options)
    hidden = hidden[0] if hidden.shape[0] == 1 else hidden.expand(-1, query.shape[1], -1, -1).flatten(0, 1)
    bias = by_row(options.bias.to(far.dtype), query.shape[1], query.shape[2])
    past = linear_logit(far[..., -1:], bias, options.join), options.linear_value(far)
    return joined(options, hidden, query, (key, value), (options.scored(sinks[0]), sinks[1]), past)


def _hidden(
    query: torch.Tensor, num_sinks: int, stream: Stream, real: torch.Tensor | None, first: int, options: HybridOptions
) -> torch.Tensor:
    """Return minus infinity for what a query does not see and zero for the rest, `[1 or B·N, 1, R·C, W+C+sinks+1]`.

    Args:
        query: Folded `[B·N, G, R·C, D]`; others as in `_join`.
    """
    chunk, span, device = options.chunk_size, options.window + options.chunk_size, query.device
    i, j = torch.arange(chunk, device=device)[:, None], torch.arange(span, device=device)
    unseen = [((j <= i) | (j > i + options.window))[None, None], i.new_zeros(1, 1, chunk, num_sinks).bool()]
    if real is not None:
        near = real.unfold(1, span, chunk)  # [B or 1, N, W+C]
        unseen[0] = unseen[0] | ~near[:, :, None]
        places = stream.positions(first, first + near.shape[1] * chunk).unflatten(1, (-1, chunk))
        unseen[1] = torch.arange(num_sinks, device=device) > places[..., None]  # [B or 1, N, C, sinks]
    rows, chunks = max(x.shape[0] for x in unseen), max(x.shape[1] for x in unseen)
    hidden = functional.pad(torch.cat([x.expand(rows, chunks, -1, -1) for x in unseen], dim=3), (0, 1))
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=device).masked_fill_(hidden, -torch.inf)
    if chunks > 1 or rows > 1:
        mask = mask.expand(query.shape[0] // chunks, -1, -1, -1)
    return mask.flatten(0, 1).repeat(1, query.shape[2] // chunk, 1)[:, None]
