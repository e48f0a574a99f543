"""Sparse attention of patterns that say where their keys are: a block of queries at a time meets its candidates only.

A pattern may have several parts, such as a window and a column, each with queries and keys of its own arrangement. Each
is softmax attention with its log-sum-exp, and they are merged: `o = Σ e^{ℓ_p − ℓ} o_p` with `ℓ = log Σ e^{ℓ_p}`. On the
way back the gradient of each part follows from the merged output and ℓ, as if all its keys had been one set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...patterns import Part, Pattern
from ..blocks import learns
from ..folding import read_by
from . import flash
from .bundles import Entries
from .jobs import Places, every_of, jobs_of


def sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, places: Places, scale: float
) -> torch.Tensor:
    """Compute attention of query `[B, H, T, D]` over key `[B, G, S, D]` and value `[B, G, S, V]`; a query that sees no
    key gets zero."""
    q, k, v = flash.one_width(query, key, value)
    if learns((q, k, v)):
        output = _Gathered.apply(pattern.parts, places, scale, q, k, v)
    else:
        output = _forward(pattern.parts, places, scale, q, k, v, wants_total=False)[0]
    return output[..., : value.shape[3]]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: tuple[Part, ...],
        places: Places,
        scale: float,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        output, logsumexp = _forward(parts, places, scale, query, key, value)
        ctx.parts, ctx.places, ctx.scale = parts, places, scale
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value)]
        logsumexp = logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf)  # of blind queries: no weight at all
        for part in ctx.parts:
            every = every_of(part, query, ctx.places)
            taken = [_take(x, every.keys, query.shape[1]) for x in (key, value)]
            given = grads[1:]
            if every.positions is not None:
                given = [torch.zeros_like(x, dtype=wide) for x in taken]
            for job in jobs_of(part, query, ctx.places, every, False):
                if job.is_empty:
                    continue
                k, v = (_take(x, job.keys, query.shape[1]) for x in taken)
                grad, q, o, total = (job.queries.batch(x) for x in (grad_output, query, output, logsumexp))
                found = flash.backward(grad, q, o, total, k, v, job.hidden, ctx.scale)
                job.queries.add(grads[0], found[0])
                for whole, own in zip(given, found[1:], strict=True):
                    _give(whole, job.keys, own)
            if every.positions is not None:
                for whole, own in zip(grads[1:], given, strict=True):
                    _give(whole, every.keys, own)
        return None, None, None, *(grad.to(query.dtype) for grad in grads)


def _forward(
    parts: tuple[Part, ...],
    places: Places,
    scale: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    wants_total: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, T, V]` and the log-sum-exp of each query's scores `[B, H, T]`, in at least float32, of
    all parts if that is wanted."""
    batch, heads, tokens, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
    total = query.new_full((batch, heads, tokens), -torch.inf, dtype=wide)
    for index, part in enumerate(parts):
        every = every_of(part, query, places)
        taken = [_take(x, every.keys, heads) for x in (key, value)]
        for job in jobs_of(part, query, places, every, len(parts) > 1):
            there, before = (job.queries.view(x) for x in (output, total))
            if job.is_empty:
                if not index:
                    there.zero_()
                continue
            q, (k, v) = job.queries.batch(query), (_take(x, job.keys, heads) for x in taken)
            own, logsumexp = flash.forward(q, k, v, job.hidden, scale)
            if job.blind is not None:
                logsumexp = logsumexp.masked_fill(job.blind, -torch.inf)
            own, logsumexp = (job.queries.unbatch(x) for x in (own, logsumexp))
            if index:
                flash.merge_(there, before, own, logsumexp, last=index == len(parts) - 1 and not wants_total)
            else:
                there.copy_(own)
                before.copy_(logsumexp)
    return output, total


def _take(x: torch.Tensor, keys: Entries | torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the entries `keys` of x `[B, G, S, D]`: `[B, G, n, D]`, of a bundle `[B·C, G, n, D]`, or `[B, H, n, D]`
    where they differ by head."""
    if isinstance(keys, Entries):
        return keys.batch(x)
    rows = x.transpose(1, 2)  # [B, S, G, D], the layout of a projection
    if keys.ndim == 1:
        return rows.index_select(1, keys).transpose(1, 2)
    head = read_by(x, num_heads)[:, None]
    flat = head * x.shape[2] + keys if x.is_contiguous() else keys * x.shape[1] + head
    whole = x if x.is_contiguous() else rows  # of a store, and of a projection
    return whole.flatten(1, 2).index_select(1, flat.flatten()).unflatten(1, keys.shape)


def _give(total: torch.Tensor, keys: Entries | torch.Tensor, part: torch.Tensor) -> None:
    """Add to the entries that `_take` took."""
    part = part.to(total.dtype)
    if isinstance(keys, Entries):
        keys.add(total, part)
    elif keys.ndim == 1:
        total.index_add_(2, keys, part)
    else:
        flat = read_by(total, keys.shape[0])[:, None] * total.shape[2] + keys
        total.flatten(1, 2).index_add_(1, flat.flatten(), part.flatten(1, 2))
