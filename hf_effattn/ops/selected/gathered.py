"""Attention over selected blocks, a block of keys at a time: it meets the queries that chose it, and nobody else.

Each meeting is softmax attention with its log-sum-exp; those of one query are merged as `ops.sparse.gathered` merges
the parts of a pattern, and gradients follow from the merged output in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
            for queries, keys, hidden in _meetings(blocks[row, head], positions, row, ctx.selection, query):
                grad, q, o, total = (_heads_first(x.index_select(0, queries)) for x in by_token)
                k, v = (x[row : row + 1, head : head + 1, keys] for x in (key, value))
                found = flash.backward(grad, q, o, total[..., 0], k, v, hidden, ctx.selection.scale)
                grad_query.index_add_(0, queries, _by_token(found[0][0]).to(wide))
                for whole, part in zip(grads[1:], found[1:], strict=True):
                    whole[row, head, keys] += part[0, 0]
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
        gathered = torch.zeros(*by_token.shape[:2], value.shape[3], dtype=wide, device=query.device)
        weight = torch.full(by_token.shape[:2], -torch.inf, dtype=wide, device=query.device)
        for queries, keys, hidden in _meetings(blocks[row, head], positions, row, selection, query):
            k, v = (x[row : row + 1, head : head + 1, keys] for x in (key, value))
            own, logsumexp = flash.forward(
                _heads_first(by_token.index_select(0, queries)), k, v, hidden, selection.scale
            )
            there, before = (x.index_select(0, queries) for x in (gathered, weight))
            flash.merge_(there, before, own[0].transpose(0, 1), logsumexp[0].T)
            gathered.index_copy_(0, queries, there)
            weight.index_copy_(0, queries, before)
        output[row, heads] = gathered.transpose(0, 1).to(query.dtype)
        total[row, heads] = weight.T
    return output, total


def _groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """Go through rows and key/value heads, with the query heads of each."""
    groups = query.shape[1] // key.shape[1]
    for row in range(key.shape[0]):
        for head in range(key.shape[1]):
            yield row, head, slice(head * groups, (head + 1) * groups)


def _meetings(
    blocks: torch.Tensor, positions: torch.Tensor, row: int, selection: Selection, query: torch.Tensor
) -> Iterator[tuple[torch.Tensor, slice, torch.Tensor]]:
    """Go through the blocks of keys of one row and head: the queries that chose it `[t]`, the keys, and zero for what a
    query sees and minus infinity for the rest `[1, 1, t, block_size]`.

    Args:
        blocks: Those that each query chose `[T, num_blocks]`, negative for none.
        positions: Of the queries `[B or 1, T]`.
    """
    size, at = selection.block_size, positions[row % positions.shape[0]]
    shown, unseen = query.new_zeros(()), query.new_full((), -torch.inf)
    chosen = blocks.flatten()
    order = chosen.argsort(stable=True)  # by block, then by query
    counts = (chosen + 1).bincount().tolist()
    for block, queries in enumerate(torch.split(order // blocks.shape[1], counts), start=-1):
        if block >= 0 and queries.shape[0]:
            keys = slice(block * size, (block + 1) * size)
            place = torch.arange(keys.start, keys.stop, device=query.device)
            yield queries, keys, torch.where(place <= at[queries, None], shown, unseen)[None, None]


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """`[R, T, X]` as contiguous `[T, R, X]`."""
    return x.transpose(0, 1).contiguous()


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """`[t, R, X]` as `[1, R, t, X]`."""
    return x.transpose(0, 1)[None]
