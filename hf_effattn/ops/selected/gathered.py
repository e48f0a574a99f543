"""Attention over selected blocks, a block of keys at a time: it meets the queries that chose it, and nobody else.

Queries meet their own blocks first, many blocks in one batch and under a mask; queries of later blocks see all of the
blocks that they chose. Each meeting is softmax attention with its log-sum-exp; those of one query are merged as
`ops.sparse.gathered` merges the parts of a pattern, and gradients follow from the merged output in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..blocks import learns
from ..sparse import flash
from .selection import Selection


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary: torch.Tensor,
    positions: torch.Tensor,
    selection: Selection,
) -> torch.Tensor:
    """Compute block by block; arguments as in `hf_effattn.ops.selected.selected_attention`."""
    blocks = selection.blocks(query, summary, positions)
    q, k, v = flash.one_width(query, key, value)
    if learns((q, k, v)):
        output = _Gathered.apply(blocks, positions, selection, q, k, v)
    else:
        output = _forward(blocks, positions, selection, q, k, v)[0]
    return output[..., : value.shape[3]]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        blocks: torch.Tensor,
        positions: torch.Tensor,
        selection: Selection,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        output, logsumexp = _forward(blocks, positions, selection, query, key, value)
        ctx.selection = selection
        ctx.save_for_backward(blocks, positions, query, key, value, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        blocks, positions, query, key, value, output, logsumexp = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value)]
        for row, head, heads in _groups(query, key):
            by_token = [_by_token(x[row, heads]) for x in (grad_output, query, output, logsumexp[..., None])]
            grad_query = torch.zeros_like(by_token[1], dtype=wide)
            for meeting in _meetings(blocks[row, head], positions, row, ctx.selection, by_token[1]):
                grad, q, o, total = (meeting.rows(x) for x in by_token)
                k, v = (meeting.columns(x[row, head]) for x in (key, value))
                found = flash.backward(grad, q, o, total[..., 0], k, v, meeting.hidden, ctx.selection.scale)
                own = found[0].reshape(-1, *grad_query.shape[1:]).to(wide)
                if isinstance(meeting.queries, slice):
                    grad_query[meeting.queries] += own
                else:
                    grad_query.index_add_(0, meeting.queries, own)
                for whole, part in zip(grads[1:], found[1:], strict=True):
                    whole[row, head, meeting.keys] += part.flatten(0, 2)
            grads[0][row, heads] = grad_query.transpose(0, 1)
        return None, None, None, *(grad.to(query.dtype) for grad in grads)


def _forward(
    blocks: torch.Tensor,
    positions: torch.Tensor,
    selection: Selection,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, T, V]` and the log-sum-exp of each query's scores `[B, H, T]`, in at least float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, num_heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, num_heads, value.shape[3]).transpose(1, 2)
    total = query.new_empty(batch, num_heads, tokens, dtype=wide)
    for row, head, heads in _groups(query, key):
        by_token = _by_token(query[row, heads])  # [T, R, D]: what a query needs lies together
        gathered = torch.empty(*by_token.shape[:2], value.shape[3], dtype=wide, device=query.device)
        weight = torch.empty(by_token.shape[:2], dtype=wide, device=query.device)
        for meeting in _meetings(blocks[row, head], positions, row, selection, by_token):
            k, v = (meeting.columns(x[row, head]) for x in (key, value))
            own, logsumexp = flash.forward(meeting.rows(by_token), k, v, meeting.hidden, selection.scale)
            own, logsumexp = own.reshape(-1, *gathered.shape[1:]), logsumexp.reshape(-1, weight.shape[1])
            if isinstance(meeting.queries, slice):  # the first meeting of these
                gathered[meeting.queries], weight[meeting.queries] = own.to(wide), logsumexp
                continue
            there, before = (x.index_select(0, meeting.queries) for x in (gathered, weight))
            flash.merge_(there, before, own, logsumexp)
            gathered.index_copy_(0, meeting.queries, there)
            weight.index_copy_(0, meeting.queries, before)
        output[row, heads] = gathered.transpose(0, 1).to(query.dtype)
        total[row, heads] = weight.T
    return output, total


def _groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """Go through rows and key/value heads, with the query heads of each."""
    groups = query.shape[1] // key.shape[1]
    for row in range(key.shape[0]):
        for head in range(key.shape[1]):
            yield row, head, slice(head * groups, (head + 1) * groups)


class Meeting(NamedTuple):
    """Queries, and the keys that they meet.

    Args:
        queries: Which of the tokens: a slice of those that meet their own blocks, or indices of any.
        keys: Which of the keys, of one block or of several that follow each other.
        hidden: Zero for what a query sees and minus infinity for the rest `[1, 1, t·R, block_size]`; None for all.
        number: How many blocks are one batch, of as many queries each.
    """

    queries: slice | torch.Tensor
    keys: slice
    hidden: torch.Tensor | None = None
    number: int = 1

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the queries of x `[T, R, X]` as `[number, 1, t·R, X]`."""
        taken = x[self.queries] if isinstance(self.queries, slice) else x.index_select(0, self.queries)
        return taken.view(self.number, 1, -1, x.shape[2])

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """Return the keys of x `[S, X]` as `[number, 1, block_size, X]`."""
        return x[self.keys].unflatten(0, (self.number, -1))[:, None]


def _meetings(
    blocks: torch.Tensor, positions: torch.Tensor, row: int, selection: Selection, by_token: torch.Tensor
) -> Iterator[Meeting]:
    """Go through the blocks of keys of one row and head, first with the queries that are in them, then with the later
    ones that chose them.

    Args:
        blocks: Those that each query chose, its own among them, `[T, num_blocks]`, negative for none.
        positions: Of the queries, one after the other, `[B or 1, T]`.
        by_token: Queries `[T, R, D]`.
    """
    size, first, tokens = selection.block_size, int(positions[row % positions.shape[0], 0]), by_token.shape[0]
    yield from _own_meetings(first, size, by_token)
    chosen = blocks.flatten()
    order = chosen.argsort(stable=True)  # by block, then by query
    counts = (chosen + 1).bincount().tolist()
    for block, queries in enumerate(torch.split(order // blocks.shape[1], counts), start=-1):
        begin, end = block * size, (block + 1) * size
        later = queries[max(min(end - first, tokens) - max(begin - first, 0), 0) :]  # behind those that are in it
        if block >= 0 and later.shape[0]:
            yield Meeting(later, slice(begin, end))


def _own_meetings(first: int, size: int, by_token: torch.Tensor) -> Iterator[Meeting]:
    """Go through the queries `[T, R, D]` from position `first` on with the blocks they are in: where whole blocks of
    queries are there, all of these at once."""
    tokens, groups = by_token.shape[:2]
    begin = min(-first % size, tokens)
    whole = (tokens - begin) // size
    end = begin + whole * size
    for start, stop, number in ((0, begin, 1), (begin, end, whole), (end, tokens, 1)):
        if start < stop:
            low = (first + start) // size * size
            place = torch.arange((stop - start) // number, device=by_token.device) + first + start - low
            seen = torch.arange(size, device=by_token.device) <= place.repeat_interleave(groups)[:, None]
            hidden = torch.where(seen, by_token.new_zeros(()), by_token.new_full((), -torch.inf))
            yield Meeting(slice(start, stop), slice(low, low + number * size), hidden[None, None], number)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """`[R, T, X]` as contiguous `[T, R, X]`."""
    return x.transpose(0, 1).contiguous()
