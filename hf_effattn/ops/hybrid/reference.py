"""The definition of hybrid attention, with T×S matrices in float64: slow on purpose, the oracle of the tests."""

from __future__ import annotations

import torch

from ..linear import LinearOutput, LinearState
from ..linear.reference import advance, gates_at
from ..stream import Stream
from .options import HybridOptions


def hybrid_attention(
    query: torch.Tensor, stream: Stream, state: LinearState, options: HybridOptions, lengths: torch.Tensor | None
) -> LinearOutput:
    """Compute both parts with explicit weights; arguments as in `hf_effattn.ops.hybrid.hybrid_attention`."""
    groups, tokens = query.shape[1] // stream.key.shape[1], query.shape[2]
    past = stream.key.shape[2] - tokens
    sink_key, sink_value = stream.sinks(options.num_sinks)
    positions = stream.positions(0, past + tokens)[:, None, None, :]  # [B or 1, 1, 1, S]
    queries = positions[..., past:].transpose(2, 3)  # [B or 1, 1, T, 1]
    distance = queries - positions
    plain = positions >= options.num_sinks
    near = plain & (distance >= 0) & (distance < options.window)
    far = plain & (distance >= options.window)
    sinks = torch.arange(sink_key.shape[2], device=query.device) <= queries

    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x.double().repeat_interleave(groups, dim=1)

    keys, values = torch.cat((sink_key, stream.key), dim=2), torch.cat((sink_value, stream.value), dim=2)
    scores = torch.einsum(
        "bhtd,bhsd->bhts", options.scored(query).double() * options.scale, repeat(options.scored(keys))
    )
    scores = scores.masked_fill(~torch.cat((sinks, near), dim=-1), -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    softmax = (scores - peak).exp()
    places = positions[:, 0, 0]  # [B or 1, S]
    plan = options.plan(places[:, past:], places)
    query_features, features = plan.queries(query).double(), plan.keys(stream.key)
    if options.recurrence is None:
        linear = torch.einsum("bhtf,bhsf->bhts", query_features, repeat(features)) * far
        remembered = repeat(state.sums)
        numerator = linear @ repeat(stream.value) + query_features @ remembered[..., :-1]
        mass = linear.sum(-1, keepdim=True) + query_features @ remembered[..., -1:]
        sums = torch.cat((numerator, mass), dim=-1)
    else:
        states = _by_recurrence(stream, state, features, options, tokens)  # [B, T+1, G, F, V+1]
        sums = torch.einsum("bhtf,bthfx->bhtx", query_features, states[:, 1:].repeat_interleave(groups, dim=2))
    by_group = sums.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, G, R·T, V+1]
    far_value, mass = options.linear_value(by_group).view(*query.shape[:3], -1), sums[..., -1:]
    bias = options.bias.double()[:, None, None]
    near_weight, far_weight = (peak.exp(), bias.exp()) if options.join == "log" else (bias.sigmoid(), 1.0)
    output = (softmax @ repeat(values)) * near_weight + far_value * mass * far_weight
    output = output / (softmax.sum(-1, keepdim=True) * near_weight + mass * far_weight)
    if options.recurrence is None:
        return LinearOutput(output.to(query.dtype), _folded(stream, state, features, options, tokens, lengths))
    last = torch.full((query.shape[0],), tokens, device=query.device) if lengths is None else lengths
    final = states[torch.arange(query.shape[0], device=query.device), last]
    return LinearOutput(output.to(query.dtype), LinearState(final.to(state.sums.dtype)))


def _folded(
    stream: Stream,
    state: LinearState,
    features: torch.Tensor,
    options: HybridOptions,
    tokens: int,
    lengths: torch.Tensor | None,
) -> LinearState:
    """The state with every key of the stream that has left the window of the last real query."""
    total = stream.key.shape[2]
    positions = stream.positions(0, total)  # [B or 1, S]
    last = positions[:, total - tokens :][:, :1] - 1 + (tokens if lengths is None else lengths[:, None])
    left = (positions >= options.num_sinks) & (last - positions >= options.window)  # [B, S]
    k, v = features.double() * left[:, None, :, None], stream.value.double()
    kv = state.kv + torch.einsum("bgsf,bgsv->bgfv", k, v).to(state.kv.dtype)
    return LinearState.of(kv, state.normalizer + k.sum(dim=2).to(state.kv.dtype))


def _by_recurrence(
    stream: Stream, state: LinearState, features: torch.Tensor, options: HybridOptions, tokens: int
) -> torch.Tensor:
    """The joined states that each query sees, one token after the other, behind the state before: `[B, T+1, …]`."""
    assert options.recurrence is not None
    total = stream.key.shape[2]
    real = (stream.positions(0, total) >= options.num_sinks).expand(features.shape[0], -1)
    gates, sums = options.plan(real=real).gates(stream.key), state.sums.double()
    found = [sums]
    for at in range(total - tokens - options.window, total - options.window):  # the key that leaves for each query
        if at >= 0:
            key = features[:, :, at] * real[:, None, at, None]
            sums = advance(sums, key, stream.value[:, :, at], gates_at(gates, at))
        found.append(sums)
    return torch.stack(found, dim=1)
