"""What transformers itself would make of each layer: its kind of attention and of cache."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.cache_utils import get_layer_types_and_kwargs

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class NativeLayer(NamedTuple):
    """One layer of a model as its family defines it.

    Args:
        kind: transformers' layer type: "full_attention", "sliding_attention", "linear_attention", ….
        window: Visible keys of a sliding layer, the query's own included; None for all.
    """

    kind: str
    window: int | None = None


def native_layers(config: Any) -> list[NativeLayer]:
    """Return the layers of the model that `config` (not a converted one's view) describes."""
    kinds, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # before 5.20: one for all layers
        options = [options if kind in (SLIDING, CHUNKED) else {} for kind in kinds]
    return [NativeLayer(kind, option.get("sliding_window")) for kind, option in zip(kinds, options, strict=True)]
