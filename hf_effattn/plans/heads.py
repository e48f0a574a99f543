"""What a choice is made for: a layer, or one of its key/value heads; and how heads make up a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

WINDOWED = ("streaming", "sliding_window")  # patterns with a window for each head


class Unit(NamedTuple):
    """A layer, or one of its key/value heads.

    Args:
        layer: Its index.
        head: None for all of the layer.
    """

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return str(self.layer) if self.head is None else f"{self.layer}.{self.head}"


def of_layer(specs: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the config of a layer whose key/value heads have these, as JSON-able data; None is softmax attention.

    Args:
        specs: Of each head in turn, or a single one of all. If they differ, then in nothing but windows.
    """
    if all(spec == specs[0] for spec in specs):
        return specs[0]
    given = [spec for spec in specs if spec is not None]
    windows = [None if spec is None else spec["pattern"]["window"] for spec in specs]
    return {**given[0], "pattern": {**given[0]["pattern"], "window": windows}}
