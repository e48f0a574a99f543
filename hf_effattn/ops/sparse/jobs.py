"""Which keys the queries of a part of a pattern meet: one block of queries after the other, with its candidates."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ...patterns import Part
from ...patterns.parts import Ranges
from . import flash
from .bundles import BYTES, Block, Entries, bundled


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
    """One block of queries and its candidates, or C of them that are bundled.

    Args:
        queries: Which of the queries.
        keys: Which of the keys: entries, or indices `[n]` or `[H, n]`.
        hidden: Zero for what a query sees and minus infinity for the rest, `[1 or B·C, 1 or H, t, n]`; None where each
            sees all.
        blind: Which queries see nothing at all, booleans `[1 or B·C, 1 or H, t]`; None where nobody asks.
    """

    queries: Entries
    keys: Entries | torch.Tensor
    hidden: torch.Tensor | None = None
    blind: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there are no keys."""
        return isinstance(self.keys, Entries) and self.keys.first.stop == 0


class Mask(NamedTuple):
    """What queries do not see, and which see nothing: `hidden` and `blind` of a job."""

    hidden: torch.Tensor
    blind: torch.Tensor | None


class Every(NamedTuple):
    """The candidates of all queries of a growing part, in their order, of which each block has the first ones; of
    another part, all keys.

    Args:
        keys: Which of the keys; positions: theirs `[n]`, None for all keys; listed: the same as numbers.
    """

    keys: Entries | torch.Tensor
    positions: torch.Tensor | None = None
    listed: Sequence[int] = ()


def every_of(part: Part, query: torch.Tensor, places: Places) -> Every:
    """Return what the blocks of a part take their candidates from."""
    if not part.growing:
        return Every(Entries(slice(None)))
    end = places.first + query.shape[2]
    keys, positions = _candidates(part, ranges_of(part, end - 1, end), end - 1, end, query, places)
    return Every(Entries(keys) if isinstance(keys, slice) else keys, positions, positions.tolist())


def jobs_of(part: Part, query: torch.Tensor, places: Places, every: Every, wants_blind: bool) -> Iterator[Job]:
    """Cut the queries of one part into blocks, and find their candidates among `every`.

    Little is done for a block without a mask: between two products the interpreter has nothing in its caches.
    """
    first, end, stride, device = places.first, places.first + query.shape[2], part.stride, query.device
    masks: dict[tuple[int, ...], Mask] = {}
    for start, stop, ranges, number, shift in _blocks(part, query, first, end, places.slots is None):
        queries = Entries(slice(start - first, stop - first, stride), number, shift)
        last = max((range(*each)[-1] for each in ranges), default=-1)
        if every.positions is None:
            found, positions = _candidates(part, ranges, start, stop, query, places)
        else:
            found = slice(0, bisect.bisect_right(every.listed, last))
            positions = every.positions[found]
        keys = Entries(found, number, shift) if isinstance(found, slice) else found
        if not positions.shape[-1]:
            yield Job(queries, Entries(slice(0, 0)))
        elif part.exact and last <= start and (part.by_head is None or _are_before(positions, start)):
            yield Job(queries, keys)
        else:
            is_relative = len(ranges) == 1 and places.slots is None and part.by_head is None
            is_relative = is_relative and (part.relative or part.exact)
            low, _, step = ranges[0] if is_relative else (0, 0, 1)
            kind = (len(range(start, stop, stride)), positions.shape[-1], start - low, step)
            mask = masks.get(kind)
            if mask is None:
                at = torch.arange(start, stop, stride, device=device)
                late = None if is_relative or number == 1 else shift * torch.arange(number, device=device)
                mask = _mask(part, query, at, positions, late, wants_blind)
                if is_relative:
                    masks[kind] = mask
            yield Job(queries, keys, mask.hidden, mask.blind)


def _are_before(positions: torch.Tensor, start: int) -> bool:
    """Whether all positions stand for keys, and are not behind `start`."""
    least, most = positions.aminmax()
    return int(least) >= 0 and int(most) <= start


def _mask(
    part: Part,
    query: torch.Tensor,
    at: torch.Tensor,
    positions: torch.Tensor,
    late: torch.Tensor | None,
    wants_blind: bool,
) -> Mask:
    """Return what queries at positions `at` `[t]` see of candidates at `positions` `[n]` or `[H, n]`.

    Args:
        late: How many positions later each block of a bundle is `[C]`; None if that changes nothing.
    """
    own, other = at.view(1, 1, -1, 1), positions.view(1, -1, 1, positions.shape[-1])
    if late is not None:
        own, other = own + late.view(-1, 1, 1, 1), other + late.view(-1, 1, 1, 1)
    if part.exact:
        seen = other <= own
    else:
        heads = torch.arange(query.shape[1], device=query.device)[None, :, None, None]
        seen = part.mask_mod(heads.new_zeros(1, 1, 1, 1), heads, own, other)  # [C, 1 or H, t, n]
    if part.by_head is not None:
        seen = seen & (other >= 0)
    if seen.shape[0] > 1:
        seen = seen[:1] if bool((seen == seen[:1]).all()) else seen.repeat(query.shape[0], 1, 1, 1)
    hidden = torch.where(seen, query.new_zeros(()), query.new_full((), -torch.inf))
    sees_something = part.exact and part.by_head is None and bool(positions[0] <= at[0])
    return Mask(hidden, ~seen.any(dim=-1) if wants_blind and not sees_something else None)


def ranges_of(part: Part, start: int, stop: int) -> Ranges:
    """Return where the candidates of the queries `start .. stop` are, from 0 on and before `stop`."""
    found = part.candidates(start, stop)
    cut = [(low if low >= 0 else low % step, min(high, stop), step) for low, high, step in found]
    return [(low, high, step) for low, high, step in cut if low < high]


def distinct(positions: torch.Tensor) -> torch.Tensor:
    """Return the positions `[H, n]` of each head in their order, −1 for those that were there twice."""
    positions = positions.sort(dim=1).values
    twice = positions[:, 1:] == positions[:, :-1]
    return torch.cat((positions[:, :1], positions[:, 1:].masked_fill(twice, -1)), dim=1)


def _blocks(part: Part, query: torch.Tensor, first: int, end: int, in_order: bool) -> Iterable[Block]:
    """Return the blocks of queries: of a growing part the last one first, since buffers that grow from block to block
    would each need new memory.

    Args:
        in_order: Whether key j is at position j.
    """
    found = []
    for begin in range(first, min(first + part.stride, end)):
        start = begin
        while start < end:
            size = part.block_size * part.stride
            after = start // size * size + size + begin % part.stride
            stop = min(after, end)
            found.append(Block(start, stop, ranges_of(part, start, stop)))
            start = after
    if part.growing:
        return reversed(found)
    if not in_order or part.by_head is not None:
        return found
    found = [block._replace(ranges=_in_lines(block.ranges, end, query.dtype, part.exact)) for block in found]
    return bundled(sorted(found), part.stride, BYTES // query.dtype.itemsize)


def _in_lines(ranges: Ranges, end: int, dtype: torch.dtype, is_exact: bool) -> Ranges:
    """Return one range with more candidates, if there are so many before it, or where all before would be seen behind
    it, so that scores fill whole lines."""
    if len(ranges) != 1:
        return ranges
    low, high, step = ranges[0]
    number = len(range(low, high, step))
    more = (flash.whole_lines(number, dtype) - number) * step
    if is_exact:
        return [(low, high + more, step)] if high + more <= end else ranges
    return [(low - more, high, step)] if low >= more else ranges


def _candidates(
    part: Part, ranges: Ranges, start: int, stop: int, query: torch.Tensor, places: Places
) -> tuple[slice | torch.Tensor, torch.Tensor]:
    """Return the candidates of the queries `start .. stop` as keys, and their positions, `[n]` in their order or
    `[H, n]`; negative positions stand for nothing."""
    heads, device = query.shape[1], query.device
    if len(ranges) == 1 and part.by_head is None and places.slots is None:
        return slice(*ranges[0]), torch.arange(*ranges[0], device=device)
    positions = torch.cat([torch.arange(*each, device=device) for each in ranges] or [torch.arange(0, device=device)])
    if part.by_head is None:
        positions = positions.unique()
    else:
        positions = torch.cat((positions.expand(heads, -1), part.by_head(start, stop, heads).to(device)), dim=1)
        positions = positions if part.exact else distinct(positions)
    if places.slots is None:
        return positions.clamp(min=0), positions
    known = (positions >= 0) & (positions < places.slots.shape[0])
    keys = torch.where(known, places.slots[positions.clamp(0, places.slots.shape[0] - 1)], -1)
    if part.by_head is None:
        return keys[keys >= 0], positions[keys >= 0]
    return keys.clamp(min=0), positions.masked_fill(keys < 0, -1)
