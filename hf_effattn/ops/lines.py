"""Softmax attention over columns and diagonals of the attention matrix, which a stretch of queries shares."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .sparse import masked

QUERIES = 64  # at a time, unless bands are wider


class Lines(NamedTuple):
    """What the queries of one stretch see of the keys before it.

    Args:
        columns: Positions of keys `[B, G, C]`, −1 for none.
        bands: Bands of distances `[B, G, N]`: b stands for the distances b · width up to (b + 1) · width − 1; −1 for
            none.
    """

    columns: torch.Tensor
    bands: torch.Tensor


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    start: torch.Tensor,
    lines: Lines,
    width: int,
    longest: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute `softmax(q·kᵀ · scale over the keys seen) v` for queries of one stretch, some of them at a time.

    A query at position t sees, up to itself, the keys from `start` on, those at `columns`, and those whose distance to
    it is in one of the `bands`. Only these are read.

    Args:
        query: `[B, H, T, D]`, at the positions `first .. first + T − 1` of each row.
        key: `[B, G, S, D]`, key j at position j; value `[B, G, S, V]`.
        first: `[B]`; start: Where the stretch begins `[B]`.
        lines: Columns (all before `start`) and bands.
        width: Distances of a band.
        longest: The largest `first + T − start` of the rows.
    """
    (batch, groups, slots, _), tokens = key.shape, query.shape[2]
    by_head = query.unflatten(1, (groups, -1)).flatten(0, 1)  # [B·G, R, T, D]
    rows = (torch.arange(batch * groups, device=key.device) * slots).view(batch, groups, 1)
    flat_key, flat_value = key.flatten(0, 2), value.flatten(0, 2)
    in_band = _distances_in_bands(lines.bands, width, slots)
    outputs = []
    size = max(width, QUERIES)
    for begin in range(0, tokens, size):
        tile = by_head[:, :, begin : begin + size]
        end = begin + tile.shape[2]
        place = first[:, None] + torch.arange(begin, end, device=key.device)  # [B, n]
        own = start[:, None] + torch.arange(longest - tokens + end, device=key.device)  # [B, L]
        index, seen = _seen(place, start, own, lines, width, in_band)
        index = (index.clamp(0, slots - 1) + rows).flatten()
        keys, values = (
            x.index_select(0, index).view(batch * groups, 1, -1, x.shape[1]) for x in (flat_key, flat_value)
        )
        outputs.append(masked.attend(tile, keys, values, seen.flatten(0, 1)[:, None], scale, dropout))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.unflatten(0, (batch, groups)).flatten(1, 2)


def _distances_in_bands(bands: torch.Tensor, width: int, slots: int) -> torch.Tensor:
    """Return whether each distance is in one of the bands `[B, G, ≥ slots]`."""
    number = slots // width + 2
    is_band = torch.zeros(*bands.shape[:2], number, dtype=torch.bool, device=bands.device)
    is_band.scatter_(2, bands.masked_fill(bands < 0, number - 1).clamp(max=number - 1), True)
    return is_band[:, :, :-1].repeat_interleave(width, dim=2)


def _seen(
    place: torch.Tensor,
    start: torch.Tensor,
    own: torch.Tensor,
    lines: Lines,
    width: int,
    in_band: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions of keys `[B, G, K]` and which of them the queries at `place` `[B, n]` see `[B, G, n, K]`, each
    once: those of the own stretch, then columns that are in none of the query's bands, then the bands."""
    columns, groups, number = lines.columns, lines.columns.shape[1], place.shape[1]
    distance = place[:, None, :, None] - columns[:, :, None]  # [B, G, n, C]
    twice = in_band.gather(2, distance.clamp(0, in_band.shape[2] - 1).flatten(2)).view(distance.shape)
    in_column = (columns >= 0)[:, :, None] & ~twice

    back = torch.arange(number + width - 1, device=place.device)  # how far behind the last query's first in the band
    banded = place[:, -1, None, None, None] - lines.bands[..., None] * width - back  # [B, G, N, n + width − 1]
    there = (banded >= 0) & (banded < start[:, None, None, None]) & (lines.bands >= 0)[..., None]
    late = back - torch.arange(number - 1, -1, -1, device=place.device)[:, None]  # [n, n + width − 1]: of each query
    of_query = ((late >= 0) & (late < width)).repeat(1, lines.bands.shape[2])

    in_own = (own[:, None, None] <= place[:, None, :, None]).expand(-1, groups, -1, -1)
    index = torch.cat((own[:, None].expand(-1, groups, -1), columns, banded.flatten(2)), dim=2)
    return index, torch.cat((in_own, in_column, there.flatten(2)[:, :, None] & of_query), dim=3)
