"""Where the keys of a pattern are, so that they are found without looking at all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Ranges = list[tuple[int, int, int]]  # of positions: low, high (not included), step
Candidates = Callable[[int, int], Ranges]
CandidatesByHead = Callable[[int, int, int], torch.Tensor]

BLOCK = 128


def query_block(window: int) -> int:
    """Return how many queries should share the keys of their windows."""
    return min(max(window // 4, 64), 256)


@dataclass(frozen=True)
class Part:
    """Some keys of a pattern: a predicate, and for a block of queries few candidates, all keys it admits among them.

    Queries are taken in blocks of positions `start, start + stride, …` before `stop`; blocks begin at multiples of
    `block_size` (counted in queries of their class).

    Args:
        mask_mod: Which keys it admits; of the signature of `Pattern.mask_mod`, and implies `k <= q`.
        candidates: `(start, stop) -> ranges` of key positions; they may overlap, and reach beyond the queries.
        stride: Distance of the queries that are computed together.
        block_size: How many of them.
        by_head: `(start, stop, num_heads) -> positions [H, n]`, candidates that differ by head, negative where a head
            has fewer.
        exact: Whether every query of a block sees all of its candidates that are not behind it, each of which is there
            once.
        growing: Whether the candidates of a block are those of the last block before a position that is theirs, the
            largest `high`: all of them are then gathered once.
        relative: Whether what it admits is told by the distance of query and key alone.
    """

    mask_mod: MaskMod
    candidates: Candidates
    stride: int = 1
    block_size: int = BLOCK
    by_head: CandidatesByHead | None = None
    exact: bool = False
    growing: bool = False
    relative: bool = False

    def joined(self, other: Part) -> Part:
        """Return the part of what either admits; both have the same stride."""
        first, second = self, other
        by_head = first.by_head or second.by_head
        if first.by_head and second.by_head:
            by_head = _both(first.by_head, second.by_head)
        return Part(
            lambda b, h, q, k: first.mask_mod(b, h, q, k) | second.mask_mod(b, h, q, k),
            lambda start, stop: first.candidates(start, stop) + second.candidates(start, stop),
            first.stride,
            min(first.block_size, second.block_size),
            by_head,
            relative=first.relative and second.relative,
        )

    def limited(self, mask_mod: MaskMod) -> Part:
        """Return the part of what `mask_mod` admits, too."""
        own = self.mask_mod
        return replace(
            self,
            mask_mod=lambda b, h, q, k: own(b, h, q, k) & mask_mod(b, h, q, k),
            exact=False,
            relative=False,
        )

    def without(self, other: Part) -> Part:
        """Return the part of what `other` does not admit."""
        first, second = self.mask_mod, other.mask_mod
        return replace(
            self,
            mask_mod=lambda b, h, q, k: first(b, h, q, k) & ~second(b, h, q, k),
            exact=False,
            relative=self.relative and other.relative,
        )


Parts = tuple[Part, ...]


def union(first: Parts, second: Parts) -> Parts:
    """Return parts that admit each key that either admits, once; none if either has none."""
    if not first or not second:
        return ()
    by_stride: dict[int, Part] = {}
    for part in (*first, *second):
        there = by_stride.get(part.stride)
        by_stride[part.stride] = part if there is None else there.joined(part)
    disjoint: list[Part] = []
    for stride in sorted(by_stride):
        part = by_stride[stride]
        for earlier in disjoint:
            part = part.without(earlier)
        disjoint.append(part)
    return tuple(disjoint)


def _both(first: CandidatesByHead, second: CandidatesByHead) -> CandidatesByHead:
    return lambda start, stop, heads: torch.cat((first(start, stop, heads), second(start, stop, heads)), dim=1)
