"""Which keys the queries of a part of a pattern meet: one block of queries after the other, with its candidates."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ...patterns import Part
from ...patterns.parts import Ranges
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
            all, or with `lead` the candidates up to its own.
        blind: Which queries see nothing at all, booleans `[1, 1 or H, t]`; None where nobody asks.
        lead: How many keys are before the first query, of keys that follow each other up to the last query's own or
            further; None of other keys. With as many more queries before them, attention is causal.
    """

    queries: slice
    keys: slice | torch.Tensor
    hidden: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    lead: int | None = None

    @property
    def is_causal(self) -> bool:
        return self.lead is not None

    @property
    def is_empty(self) -> bool:
        """Whether there are no keys."""
        return isinstance(self.keys, slice) and self.keys.stop == 0

    @property
    def rows(self) -> slice:
        """The queries, and those before them that make attention causal."""
        return slice(self.queries.start - self.lead, self.queries.stop) if self.lead else self.queries


class Every(NamedTuple):
    """The candidates of all queries of a growing part, in their order, of which each block has the first ones; of
    another part, all keys.

    Args:
        keys: Which of the keys; positions: theirs `[n]`, None for all keys; listed: the same as numbers.
    """

    keys: slice | torch.Tensor
    positions: torch.Tensor | None = None
    listed: Sequence[int] = ()


def every_of(part: Part, query: torch.Tensor, places: Places) -> Every:
    """Return what the blocks of a part take their candidates from."""
    if not part.growing:
        return Every(slice(None))
    end = places.first + query.shape[2]
    keys, positions = _candidates(part, ranges_of(part, end - 1, end), end - 1, end, query, places)
    return Every(keys, positions, positions.tolist())


def jobs_of(part: Part, query: torch.Tensor, places: Places, every: Every, wants_blind: bool) -> Iterator[Job]:
    """Cut the queries of one part into blocks, and find their candidates among `every`.

    Little is done for a block without a mask: between two products the interpreter has nothing in its caches.
    """
    first, end, stride = places.first, places.first + query.shape[2], part.stride
    heads = torch.arange(query.shape[1], device=query.device)[None, :, None, None]
    zero, shown, unseen = heads.new_zeros(1, 1, 1, 1), query.new_zeros(()), query.new_full((), -torch.inf)
    for start, stop in _blocks(part, first, end):
        block = slice(start - first, stop - first, stride)
        ranges = ranges_of(part, start, stop)
        last = max((range(*each)[-1] for each in ranges), default=-1)
        if part.exact and not part.growing and places.slots is None and _leads(ranges, start, stop, first):
            low = ranges[0][0]
            yield Job(block, slice(low, min(low + flash.whole_lines(stop - low, query.dtype), end)), lead=start - low)
            continue
        if every.positions is None:
            keys, positions = _candidates(part, ranges, start, stop, query, places)
        else:
            keys = slice(0, bisect.bisect_right(every.listed, last))
            positions = every.positions[keys]
        if not positions.shape[-1]:
            yield Job(block, slice(0, 0))
        elif part.exact and part.by_head is None and last <= start:
            yield Job(block, keys)
        else:
            at = torch.arange(start, stop, stride, device=query.device)[None, None, :, None]
            other = positions.view(1, -1, 1, positions.shape[-1])
            seen = other <= at if part.exact else part.mask_mod(zero, heads, at, other)  # [1, 1 or H, t, n]
            seen = seen & (other >= 0) if part.by_head else seen
            hidden = torch.where(seen, shown, unseen)
            blind = ~seen.any(dim=-1) if wants_blind else None
            yield Job(block, keys, hidden, blind)


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


def _leads(ranges: Ranges, start: int, stop: int, first: int) -> bool:
    """Whether the candidates of the queries `start .. stop` follow each other up to `stop`, from a query's on."""
    return len(ranges) == 1 and ranges[0][1:] == (stop, 1) and first <= ranges[0][0] <= start


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
        own = part.by_head(start, stop, heads).to(device)
        positions = distinct(torch.cat((positions.expand(heads, -1), own), dim=1))
    if places.slots is None:
        return positions.clamp(min=0), positions
    known = (positions >= 0) & (positions < places.slots.shape[0])
    keys = torch.where(known, places.slots[positions.clamp(0, places.slots.shape[0] - 1)], -1)
    if part.by_head is None:
        return keys[keys >= 0], positions[keys >= 0]
    return keys.clamp(min=0), positions.masked_fill(keys < 0, -1)
