"""Sparse attention of patterns that say where their keys are: a block of queries at a time meets its candidates only.

A pattern may have several parts, such as a window and a column, each with queries and keys of its own arrangement. Each
is softmax attention with its log-sum-exp, and they are merged: `o = Σ e^{ℓ_p − ℓ} o_p` with `ℓ = log Σ e^{ℓ_p}`. On the
way back the gradient of each part follows from the merged output and ℓ, as if all its keys had been one set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ...patterns import Part, Pattern
from ..blocks import learns
from . import flash


class Places(NamedTuple):
    """Where queries and keys stand, the same in all rows.

    Args:
        first: Position of the first query; the others follow.
        slots: Index of the key at each position from 0 on, −1 where there is none; None if key j is at position j.
    """

    first: int = 0
    slots: torch.Tensor | None = None

    @classmethod
    def of(cls, first: int, key_positions: torch.Tensor) -> Places:
        """Return the places for keys at `key_positions` `[S]`, negative for slots nobody sees."""
        slots = key_positions.new_full((int(key_positions.max()) + 2,), -1)
        order = torch.arange(key_positions.shape[0], device=slots.device)
        slots[key_positions.clamp(min=-1)] = order  # those without a position go into the last entry, which goes
        return cls(first, slots[:-1])


class Job(NamedTuple):
    """One block of queries and its candidates.

    Args:
        queries: Which of the queries.
        keys: Which of the keys: a slice, or indices `[n]` or `[H, n]`.
        hidden: Zero for what a query sees and minus infinity for the rest, `[1, 1 or H, t, n]`; None where each sees
            all, or with `causal` the candidates up to its own.
        blind: Which queries see nothing at all, booleans `[1, 1 or H, t]`; None where nobody asks.
    """

    queries: slice
    keys: slice | torch.Tensor
    hidden: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    causal: bool = False


def sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, places: Places, scale: float
) -> torch.Tensor:
    """Compute attention of query `[B, H, T, D]` over key `[B, G, S, D]` and value `[B, G, S, V]`; a query that sees no
    key gets zero."""
    q, k, v = flash.one_width(query, key, value)
    if learns((q, k, v)):
        output = _Gathered.apply(pattern.parts, places, scale, q, k, v)
    else:
        output = _forward(pattern.parts, places, scale, q, k, v)[0]
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
            every = _every(part, query, ctx.places)
            taken = [_take(x, every.keys, query.shape[1]) for x in (key, value)]
            given = grads[1:]
            if every.positions is not None:
                given = [torch.zeros_like(x, dtype=wide) for x in taken]
            for job in _jobs(part, query, ctx.places, every, False):
                k, v = (_take(x, job.keys, query.shape[1]) for x in taken)
                grad, q, o, total = (x[:, :, job.queries] for x in (grad_output, query, output, logsumexp))
                found = flash.backward(grad, q, o, total, k, v, job.hidden, ctx.scale, job.causal)
                grads[0][:, :, job.queries] += found[0]
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, T, V]` and the log-sum-exp of each query's scores `[B, H, T]`, in at least float32."""
    batch, heads, tokens, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(batch, tokens, heads, value.shape[3]).transpose(1, 2)
    total = query.new_full((batch, heads, tokens), -torch.inf, dtype=wide)
    for index, part in enumerate(parts):
        every = _every(part, query, places)
        taken = [_take(x, every.keys, heads) for x in (key, value)]
        for job in _jobs(part, query, places, every, len(parts) > 1):
            q, (k, v) = query[:, :, job.queries], (_take(x, job.keys, heads) for x in taken)
            own, logsumexp = flash.forward(q, k, v, job.hidden, scale, job.causal)
            if job.blind is not None:
                logsumexp = logsumexp.masked_fill(job.blind, -torch.inf)
            if index:
                there, before = output[:, :, job.queries], total[:, :, job.queries]
                own, logsumexp = flash.merged(there, before, own, logsumexp)
            output[:, :, job.queries] = own
            total[:, :, job.queries] = logsumexp
    return output, total


class Every(NamedTuple):
    """The candidates of all queries of a growing part, in their order, of which each block has the first ones; of
    another part, all keys.

    Args:
        keys: Which of the keys; positions: theirs `[n]`, None for all keys.
    """

    keys: slice | torch.Tensor
    positions: torch.Tensor | None = None

    def before(self, position: int) -> tuple[slice, torch.Tensor]:
        """Return which of them are before a position, and their positions."""
        assert self.positions is not None
        number = int(torch.searchsorted(self.positions, position))
        return slice(0, number, 1), self.positions[:number]


def _every(part: Part, query: torch.Tensor, places: Places) -> Every:
    end = places.first + query.shape[2]
    return Every(*_candidates(part, end - 1, end, query, places)) if part.growing else Every(slice(None))


def _jobs(part: Part, query: torch.Tensor, places: Places, every: Every, wants_blind: bool) -> Iterator[Job]:
    """Cut the queries of one part into blocks, and find their candidates among `every`."""
    first, end, stride = places.first, places.first + query.shape[2], part.stride
    heads = torch.arange(query.shape[1], device=query.device)[None, :, None, None]
    zero, shown, unseen = heads.new_zeros(1, 1, 1, 1), query.new_zeros(()), query.new_full((), -torch.inf)
    for start, stop in _blocks(part, first, end):
        if every.positions is None:
            keys, positions = _candidates(part, start, stop, query, places)
        else:
            keys, positions = every.before(min(max(high for _, high, _ in part.candidates(start, stop)), stop))
        block = slice(start - first, stop - first, stride)
        if part.exact and every.positions is None and isinstance(keys, slice) and keys == slice(start, stop, 1):
            yield Job(block, keys, causal=True)
        elif part.exact and positions.ndim == 1 and positions.shape[0] and positions[-1] <= start:
            yield Job(block, keys)
        elif positions.shape[-1]:
            at = torch.arange(start, stop, stride, device=query.device)[None, None, :, None]
            other = positions.view(1, -1, 1, positions.shape[-1])
            seen = other <= at if part.exact else part.mask_mod(zero, heads, at, other)  # [1, 1 or H, t, n]
            seen = seen & (other >= 0) if part.by_head else seen
            hidden = torch.where(seen, shown, unseen)
            blind = ~seen.any(dim=-1) if wants_blind else None
            yield Job(block, keys, hidden, blind)


def _blocks(part: Part, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where the blocks of queries reach: of a growing part the last one first, since buffers that
    grow from block to block would each need new memory."""
    found = []
    for begin in range(first, min(first + part.stride, end)):
        start = begin
        while start < end:
            size = part.block_size * part.stride
            after = start // size * size + size + begin % part.stride
            found.append((start, min(after, end)))
            start = after
    yield from reversed(found) if part.growing else found


def _candidates(
    part: Part, start: int, stop: int, query: torch.Tensor, places: Places
) -> tuple[slice | torch.Tensor, torch.Tensor]:
    """Return the candidates of the queries `start .. stop` as keys, and their positions, `[n]` in their order or
    `[H, n]`; negative positions stand for nothing."""
    heads, device = query.shape[1], query.device
    ranges = [
        (low if low >= 0 else low % step, min(high, stop), step) for low, high, step in part.candidates(start, stop)
    ]
    ranges = [each for each in ranges if each[0] < each[1]]
    if len(ranges) == 1 and part.by_head is None and places.slots is None:
        return slice(*ranges[0]), torch.arange(*ranges[0], device=device)
    positions = torch.cat([torch.arange(*each, device=device) for each in ranges] or [torch.arange(0, device=device)])
    if part.by_head is None:
        positions = positions.unique()
    else:
        own = part.by_head(start, stop, heads).to(device)
        positions = torch.cat((positions.expand(heads, -1), own), dim=1).sort(dim=1).values
        twice = positions[:, 1:] == positions[:, :-1]
        positions = torch.cat((positions[:, :1], positions[:, 1:].masked_fill(twice, -1)), dim=1)
    if places.slots is None:
        return positions.clamp(min=0), positions
    known = (positions >= 0) & (positions < places.slots.shape[0])
    keys = torch.where(known, places.slots[positions.clamp(0, places.slots.shape[0] - 1)], -1)
    if part.by_head is None:
        return keys[keys >= 0], positions[keys >= 0]
    return keys.clamp(min=0), positions.masked_fill(keys < 0, -1)


def _take(x: torch.Tensor, keys: slice | torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the entries `keys` of x `[B, G, S, D]`: `[B, G, n, D]`, or `[B, H, n, D]` where they differ by head."""
    if isinstance(keys, slice):
        return x[:, :, keys]
    rows = x.transpose(1, 2)  # [B, S, G, D], the layout of a projection
    if keys.ndim == 1:
        return rows.index_select(1, keys).transpose(1, 2)
    flat = keys * x.shape[1] + _groups(x, num_heads)[:, None]
    return rows.flatten(1, 2).index_select(1, flat.flatten()).unflatten(1, keys.shape)


def _give(total: torch.Tensor, keys: slice | torch.Tensor, part: torch.Tensor) -> None:
    """Add to the entries that `_take` took."""
    part = part.to(total.dtype)
    if isinstance(keys, slice):
        total[:, :, keys] += part
    elif keys.ndim == 1:
        total.index_add_(2, keys, part)
    else:
        flat = _groups(total, keys.shape[0])[:, None] * total.shape[2] + keys
        total.flatten(1, 2).index_add_(1, flat.flatten(), part.flatten(1, 2))


def _groups(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The key/value head of x `[B, G, S, D]` that each of the query heads reads, `[H]`."""
    return torch.arange(num_heads, device=x.device) // (num_heads // x.shape[1])
