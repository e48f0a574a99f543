"""Sliding windows with sinks, a block of queries at a time: each block meets the sinks and the keys of its window only.

Time and memory grow linearly with the text (without an end of the window, it is dense attention). Blocks whose keys are
all plain (real, and not sinks) share one small additive mask, and without gradients several of them are one batch; only
the first blocks of a row, where sinks and padding lie, compute a mask from positions.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...patterns import Band
from ..blocks import Blocks, Tensors, in_blocks, learns
from ..stream import Stream
from .bundles import BYTES, Block, Entries, bundled
from .flash import whole_lines
from .masked import attend, attend_causal


def sparse_attention(
    query: torch.Tensor, stream: Stream, band: Band, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Compute attention of `query` `[B, H, T, D]` over `stream` under `band`; the window must not be 0.

    Args:
        query: Or `[B, H, T, 2D]`, where behind each query stands the form in which it meets the sinks.
    """
    dim, two_forms = stream.key.shape[3], query.shape[3] > stream.key.shape[3]
    tokens, past = query.shape[2], stream.key.shape[2] - query.shape[2]
    window = past + tokens if band.window is None else band.window
    if past == 0 and tokens <= window:
        return attend_causal(query[..., :dim], stream.key, stream.value, scale, dropout)
    size = min(max(window // 4, 64), 256)
    found = _blocks(query, stream, band.num_sinks, window, size)
    masks: dict[tuple[int, int], torch.Tensor] = {}

    def compute(
        block: int, carry: torch.Tensor | None, parts: Tensors, sinks: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        (start, stop, ((low, high, _),), number, _), num_sinks = found[block], sinks[0].shape[2]
        queries, keys = (Entries(slice(n), number, size) for n in (stop - start, high - low))
        q, key, value = queries.batch(parts[0]), *(keys.batch(x) for x in parts[1:])
        if number > 1:
            sinks = [x.repeat_interleave(number, dim=0) for x in sinks]
        if two_forms:
            sink_key, key = functional.pad(sinks[0], (dim, 0)), functional.pad(key, (0, dim))
            key, value = torch.cat((sink_key, key), dim=2), torch.cat((sinks[1], value), dim=2)
            value = functional.pad(value, (0, 2 * dim - value.shape[3]))  # the fused kernel wants one width
        elif band.num_sinks:
            key, value = torch.cat((sinks[0], key), dim=2), torch.cat((sinks[1], value), dim=2)
        if stream.least + low >= band.num_sinks:
            shape = (q.shape[2], high - low)
            mask = masks[shape] if shape in masks else _plain_mask(query, shape, num_sinks, window)
            if low:  # else the window is still growing, and the next block has another shape
                masks[shape] = mask
        else:
            mask = _edge_mask(stream, window, num_sinks, past + start, low, high)
        output = queries.unbatch(attend(q, key, value, mask, scale, dropout))
        output = output.transpose(1, 2).flatten(2, 3) if number > 1 else output
        return output[..., : stream.value.shape[3]], None

    ranges = []
    for start, stop, ((low, high, _),), number, shift in found:
        keys = (low, high + (number - 1) * shift)
        ranges.append(((start, stop + (number - 1) * shift), keys, keys))
    blocks = Blocks(compute, ranges, (), stream.value.shape[-1], repeatable=not dropout)
    return in_blocks(blocks, None, (query, stream.key, stream.value), stream.sinks(band.num_sinks))[0]


def _blocks(query: torch.Tensor, stream: Stream, num_sinks: int, window: int, size: int) -> list[Block]:
    """Cut the queries into blocks of `size`, with their keys in the stream; where nothing is learned, those with plain
    keys are bundled."""
    tokens, past = query.shape[2], stream.key.shape[2] - query.shape[2]
    most = _most(query, stream, num_sinks, size)
    plain: list[Block] = []
    others: list[Block] = []
    for start in range(0, tokens, size):
        stop, low = min(start + size, tokens), past + start - window + 1
        number = num_sinks + past + stop - low
        low -= whole_lines(number, query.dtype) - number  # keys before the windows, which nobody sees
        block = Block(start, stop, [(max(low, 0), past + stop, 1)])
        can_join = most > 1 and low > 0 and stream.least + low >= num_sinks
        (plain if can_join else others).append(block)
    return sorted([*others, *bundled(plain, 1, most * size)])


def _most(query: torch.Tensor, stream: Stream, num_sinks: int, size: int) -> int:
    """Return how many blocks one bundle may have."""
    if torch.compiler.is_compiling() or learns((query, stream.key, stream.value)):
        return 1
    most = BYTES // query.dtype.itemsize // size
    if not num_sinks:
        return most
    # Keys are copied behind the sinks, and the copies should stay in the cache; with one thread nothing is gained.
    return most // 4 if torch.get_num_threads() > 1 else 1


def _plain_mask(query: torch.Tensor, shape: tuple[int, int], num_sinks: int, window: int) -> torch.Tensor:
    """The additive mask of a block whose stream keys are real and no sinks: all sinks, and the band."""
    rows, columns = shape
    row = torch.arange(rows, device=query.device)[:, None] + columns - rows
    distance = row - torch.arange(columns, device=query.device)
    hidden = torch.cat((distance.new_zeros(rows, num_sinks).bool(), (distance < 0) | (distance >= window)), dim=1)
    return query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _edge_mask(stream: Stream, window: int, num_sinks: int, start: int, low: int, high: int) -> torch.Tensor:
    """The boolean mask `[B or 1, 1, T, S]` of a block that may meet sinks or padding among its stream keys."""
    queries, keys = stream.positions(start, high)[:, :, None], stream.positions(low, high)[:, None, :]
    distance = queries - keys
    visible = (distance >= 0) & (distance < window) & (keys >= num_sinks)
    sinks = torch.arange(num_sinks, device=queries.device)
    visible = torch.cat((sinks <= queries, visible), dim=2)
    blind = ~visible.any(dim=-1, keepdim=True)  # padded queries: any key will do, nobody reads them
    return (visible | blind)[:, None]
