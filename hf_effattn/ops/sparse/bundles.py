"""Blocks of queries that are alike, some positions apart: computed together, as rows of one batch.

One by one, the blocks of a short text, or of narrow windows, are many products of few rows, with an interpreter between
them. The queries of a pattern that strides come in classes, each one position after the other; blocks of a window
follow each other by their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ...patterns.parts import Ranges

BYTES = 2048  # of one number for each query of a bundle: caches should hold what comes of them


class Block(NamedTuple):
    """Queries `start, start + stride, …` before `stop`, and where their candidates are.

    Args:
        number: How many blocks are bundled: this one, and others of as many queries and keys, each `shift` positions
            after the one before.
    """

    start: int
    stop: int
    ranges: Ranges
    number: int = 1
    shift: int = 0


def bundled(blocks: Iterable[Block], stride: int, most: int) -> Iterator[Block]:
    """Bundle the blocks, in order of their positions, whose candidates are one range and lie alike.

    Args:
        most: Queries of a bundle.
    """
    waiting: dict[tuple[int, ...], Block] = {}
    for block in blocks:
        if len(block.ranges) != 1:
            yield block
            continue
        low, high, step = block.ranges[0]
        queries = len(range(block.start, block.stop, stride))
        kind = (queries, len(range(low, high, step)), block.start - low, step)
        before = waiting.pop(kind, None)
        if before is None:
            waiting[kind] = block
            continue
        shift = block.start - before.start if before.number == 1 else before.shift
        if block.start == before.start + before.number * shift and (before.number + 1) * queries <= most:
            waiting[kind] = before._replace(number=before.number + 1, shift=shift)
        else:
            yield before
            waiting[kind] = block
    yield from waiting.values()


class Entries(NamedTuple):
    """Entries of dimension 2 of a tensor, the first block's, and how many blocks are bundled how far apart."""

    first: slice
    number: int = 1
    shift: int = 0

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """Return these entries of x `[B, H, T, …]`: a view `[B, H, t, …]`, or of a bundle `[B, C, H, t, …]`."""
        own = x[:, :, self.first]
        if self.number == 1:
            return own
        size, stride = list(own.shape), list(own.stride())
        size.insert(1, self.number)
        stride.insert(1, self.shift * x.stride(2))
        return own.as_strided(size, stride)

    def batch(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same, of a bundle with its blocks in one batch, `[B·C, H, t, …]`."""
        return self.view(x) if self.number == 1 else self.view(x).flatten(0, 1)

    def unbatch(self, x: torch.Tensor) -> torch.Tensor:
        """Return what was computed of a batch in the shape of a view."""
        return x if self.number == 1 else x.unflatten(0, (-1, self.number))

    def add(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Add to these entries of `total` what was computed of a batch; entries of several blocks may be the same."""
        view, new = self.view(total), self.unbatch(x)
        if self.number == 1:
            view += new
            return
        for own, part in zip(view.unbind(1), new.unbind(1), strict=True):
            own += part
