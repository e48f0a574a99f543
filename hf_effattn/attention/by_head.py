"""Sparse attention whose heads see differently: key/value heads that keep the same share a store, no others."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from ..cache import KeyValueState
from ..config import SparseConfig
from ..patterns import Pattern
from .base import MECHANISMS, Mechanism
from .call import Call
from .geometry import HeadGeometry
from .sparse import SparseAttention, resolve_for

States = tuple[KeyValueState, ...]  # of the groups


class Run(NamedTuple):
    """Neighbouring key/value heads of one group.

    Args:
        group: Which group they belong to.
        first: The first of them among all of the layer, and `place` among those of the group.
        number: How many they are.
    """

    group: int
    first: int
    place: int
    number: int


@MECHANISMS.register("by_head")
class ByHeadAttention(Mechanism):
    """Sparse attention under a pattern that differs by head, such as a window for each head: some keep everything,
    others a few recent tokens (RazorAttention, arXiv 2407.15891; DuoAttention, arXiv 2410.10819).

    Key/value heads whose query heads need the same keys form a group. A group is sparse attention by itself: it has a
    backend of its own, and a store that keeps no more than its heads see. Query heads that share a key/value head share
    what it keeps: the longest of their windows. Where a pattern does not tell what single heads see, all are one group.

    Args:
        config: The pattern and the backend.
        geometry: Heads and head dimension of the layer.
    """

    options: SparseConfig

    def __init__(self, config: SparseConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        self.pattern = config.resolve()
        self.share = geometry.num_heads // geometry.num_kv_heads  # query heads of a key/value head
        pattern = resolve_for(config, geometry)
        groups = self._grouped(pattern)
        self.parts = nn.ModuleList(self._part(pattern, heads) for heads in groups)
        runs = [run for index, heads in enumerate(groups) for run in _runs(index, heads)]
        self.runs = sorted(runs, key=lambda run: run.first)

    @property
    def heads_are_alike(self) -> bool:
        return False

    def attend(
        self, state: States | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, States]:
        outputs, states = [], []
        for index, part in enumerate(self._parts()):
            own = None if state is None else state[index]
            output, own = part.attend(own, *self._taken(index, query, key, value), call)
            outputs.append(output)
            states.append(own)
        return self._joined(outputs), tuple(states)

    def advance(
        self, state: States | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> States:
        states = []
        for index, part in enumerate(self._parts()):
            own = None if state is None else state[index]
            states.append(part.advance(own, *self._taken(index, query, key, value), call))
        return tuple(states)

    def fixed(self, state: States, max_length: int) -> States:
        return tuple(part.fixed(own, max_length) for part, own in zip(self._parts(), state, strict=True))

    def num_visible(self, context_length: int) -> int:
        return max(part.num_visible(context_length) for part in self._parts())

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        return sum(part.cache_bytes(context_length, dtype) for part in self._parts())

    def flops_per_token(self, context_length: int) -> int:
        return sum(part.flops_per_token(context_length) for part in self._parts())

    def backend(self, device: str = "cpu") -> str:
        return ", ".join(dict.fromkeys(part.backend(device) for part in self._parts()))

    def describe(self) -> str:
        return f"sparse {self.pattern.describe()}"

    def _parts(self) -> list[SparseAttention]:
        return list(self.parts)  # type: ignore[arg-type]

    def _grouped(self, pattern: Pattern) -> list[list[int]]:
        """Return the key/value heads of each group: those that keep the same keys and have the same backend."""
        heads = range(self.geometry.num_kv_heads)
        if pattern.for_heads is None:
            return [list(heads)]
        groups: dict[Hashable, list[int]] = {}
        for head in heads:
            own = pattern.for_heads(self._query_heads([head]))
            groups.setdefault((own.retention, own.band), []).append(head)
        return list(groups.values())

    def _query_heads(self, heads: list[int]) -> list[int]:
        """Return the query heads of key/value heads."""
        return [head * self.share + index for head in heads for index in range(self.share)]

    def _part(self, pattern: Pattern, heads: list[int]) -> SparseAttention:
        """Return the attention of the key/value heads `heads`."""
        queries, g = self._query_heads(heads), self.geometry
        pattern = pattern if pattern.for_heads is None else pattern.for_heads(queries)
        if self.options.backend == "banded" and not pattern.is_windowed:
            raise ValueError(
                "backend 'banded' computes windows, with or without sinks, each of one length for the "
                f"{self.share} query heads of a key/value head; {self.pattern.describe()} has others: use 'auto', "
                "'masked' or 'reference'"
            )
        return SparseAttention(self.options, HeadGeometry(len(queries), len(heads), g.head_dim, g.value_dim), pattern)

    def _taken(
        self, group: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The heads of a group, of queries `[B, H, T, D]`, keys and values `[B, G, T, ·]`."""
        mine = [run for run in self.runs if run.group == group]
        queries = [query.narrow(1, run.first * self.share, run.number * self.share) for run in mine]
        keys, values = ([x.narrow(1, run.first, run.number) for run in mine] for x in (key, value))
        return _side_by_side(queries, 1), _side_by_side(keys, 1), _side_by_side(values, 1)

    def _joined(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """All heads `[B, H, T, V]` from those of the groups, in the layout of a projection, `[B, T, H, V]`."""
        rows = [output.transpose(1, 2) for output in outputs]
        found = [rows[run.group].narrow(2, run.place * self.share, run.number * self.share) for run in self.runs]
        return _side_by_side(found, 2).transpose(1, 2)


def _side_by_side(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate without a copy where there is nothing to."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _runs(group: int, heads: list[int]) -> list[Run]:
    """Return a group's heads, which ascend, as runs of neighbours."""
    places = list(enumerate(heads))
    runs = [list(run) for _, run in groupby(places, key=lambda item: item[1] - item[0])]
    return [Run(group, run[0][1], run[0][0], len(run)) for run in runs]
