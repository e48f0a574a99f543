"""Drawings of patterns beside the dense causal matrix, as text and as PNG."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..plotting import new_figure

SHADES = " ░▒▓█"
WIDEST = 64  # characters of a drawing; longer texts are drawn in cells of several tokens


@dataclass(frozen=True)
class Drawing:
    """What queries see of a text: `print` it, or `save` it as a PNG.

    Args:
        title: The pattern in words.
        visible: Which key (column) each query (row) sees, booleans `[length, length]`.
    """

    title: str
    visible: torch.Tensor = field(repr=False, compare=False)

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.visible.shape[0]

    @property
    def density(self) -> float:
        """Visible pairs of query and key, as a part of those that causal dense attention has."""
        return int(self.visible.sum()) / (self.length * (self.length + 1) / 2)

    @property
    def keys_per_query(self) -> tuple[float, int]:
        """How many keys a query sees: on average, and at most."""
        counts = self.visible.sum(dim=1)
        return float(counts.float().mean()), int(counts.max())

    def __str__(self) -> str:
        cell = -(-self.length // WIDEST)
        sparse, dense = (_text(x, cell) for x in (self.visible, torch.ones_like(self.visible).tril()))
        width = max(-(-self.length // cell), len("dense"))
        mean, most = self.keys_per_query
        unit = "" if cell == 1 else f", a cell is {cell} × {cell}"
        lines = [
            f"{self.title}: {self.length} tokens, density {self.density:.1%}, {mean:.1f} keys a query, at most {most}",
            f"{'dense':{width}}   sparse (rows are queries, columns keys{unit})",
            *(f"{a:{width}}   {b}" for a, b in zip(dense, sparse, strict=True)),
        ]
        return "\n".join(line.rstrip() for line in lines)

    def save(self, path: str | Path) -> None:
        """Write a PNG of both matrices.

        Raises:
            ImportError: without matplotlib, which the extra `plots` installs.
        """
        figure = new_figure(figsize=(9, 4.6))
        mean, most = self.keys_per_query
        panels = (("dense", torch.ones_like(self.visible).tril()), (f"{self.title}, {self.density:.1%}", self.visible))
        for axis, (title, matrix) in zip(figure.subplots(1, 2), panels, strict=True):
            axis.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("key")
            axis.set_ylabel("query")
        figure.suptitle(f"{self.length} tokens, {mean:.1f} keys a query, at most {most}", fontsize=10)
        figure.savefig(path, dpi=120)


def _text(matrix: torch.Tensor, cell: int) -> list[str]:
    """Return a row of characters for each `cell` queries, darker where more of a cell's pairs are visible."""
    length = matrix.shape[0]
    padded = torch.nn.functional.pad(matrix.float(), (0, -length % cell, 0, -length % cell))
    shares = padded.unflatten(0, (-1, cell)).unflatten(2, (-1, cell)).mean(dim=(1, 3))
    shades = (shares * (len(SHADES) - 1)).ceil().long()
    return ["".join(SHADES[int(shade)] for shade in row) for row in shades]
