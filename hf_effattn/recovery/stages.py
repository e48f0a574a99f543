"""Converting a model step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from ..convert import convert_attention
from ..notation import whole_number
from ..targets import choose_layers, find_targets


def in_groups(model: PreTrainedModel, mechanism: Any, number: int, **options: Any) -> Iterator[list[int]]:
    """Convert the layers in `number` groups, from the last layers to the first; yield the layers converted so far after
    each, so that each group can be trained before the next one comes.

    Args:
        mechanism, options: As for `convert_attention`; `layers` or `keep_softmax` say which layers there are.

    Raises:
        ValueError: if `number` is not at least 1, and as `convert_attention` does.
    """
    whole_number("number", number, 1)
    chosen = {name: options.pop(name, None) for name in ("layers", "keep_softmax")}
    layers = sorted(choose_layers(find_targets(model), **chosen), reverse=True)
    size = -(-len(layers) // number)
    for end in range(size, len(layers) + size, size):
        convert_attention(model, mechanism, layers=layers[end - size : end], **options)
        yield sorted(layers[:end])
