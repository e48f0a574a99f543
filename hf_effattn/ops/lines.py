"""Softmax attention over columns and diagonals of the attention matrix, which a stretch of queries shares."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .sparse import masked


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
    """Compute `softmax(q·kᵀ · scale over the keys seen) v` for queries of one stretch, `width` of them at a time.

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
    groups = key.shape[1]
    rows = query.shape[1] // groups
    own = start[:, None] + torch.arange(longest, device=key.device)  # [B, L]
    outputs = []
    for begin in range(0, query.shape[2], width):
        tile = query[:, :, begin : begin + width]
        number = tile.shape[2]
        place = first[:, None] + begin + torch.arange(number, device=key.device)  # [B, n]
        index, seen = _seen(place, start, own, lines, width, key.shape[2] // width + 1)
        index = index.clamp(0, key.shape[2] - 1)[..., None]
        keys, values = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (key, value))
        folded = tile.unflatten(1, (groups, rows)).flatten(2, 3)  # [B, G, R·n, D]
        output = masked.attend(folded, keys, values, seen.repeat(1, 1, rows, 1), scale, dropout)
        outputs.append(output.unflatten(2, (rows, number)).flatten(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _seen(
    place: torch.Tensor, start: torch.Tensor, own: torch.Tensor, lines: Lines, width: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions of keys `[B, G, K]` and which of them the queries at `place` `[B, n]` see `[B, G, n, K]`, each
    once.

    Args:
        most: A number of bands beyond which there are none.
    """
    batch, groups, _ = lines.columns.shape
    number = place.shape[1]
    reach = torch.arange(number + width - 1, device=place.device)
    nearest = place[:, -1, None, None, None] - lines.bands[..., None] * width  # [B, G, N, 1]
    banded = (nearest - reach).masked_fill(lines.bands[..., None] < 0, -1)  # [B, G, N, n + width − 1]
    at = place[:, None, None, :, None]  # [B, 1, 1, n, 1]
    there = (banded >= 0) & (banded < start[:, None, None, None])
    in_band = (at - banded[:, :, :, None]) // width == lines.bands[..., None, None]  # [B, G, N, n, ·]
    in_band = (in_band & there[:, :, :, None]).transpose(2, 3).flatten(3)

    columns = lines.columns
    is_band = torch.zeros(batch, groups, most + 1, dtype=torch.bool, device=place.device)
    is_band.scatter_(2, lines.bands.masked_fill(lines.bands < 0, most), True)
    distance = (place[:, None, :, None] - columns[:, :, None]) // width  # [B, G, n, C]
    twice = is_band.gather(2, distance.clamp(0, most - 1).flatten(2)).view(distance.shape)
    in_column = (columns >= 0)[:, :, None] & ~twice

    in_own = (own[:, None, None] <= place[:, None, :, None]).expand(-1, groups, -1, -1)
    index = torch.cat((own[:, None].expand(-1, groups, -1), columns, banded.flatten(2)), dim=2)
    return index, torch.cat((in_own, in_column, in_band), dim=3)
