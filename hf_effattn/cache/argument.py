"""The name under which a forward takes its cache: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the parameter of `forward` that receives the cache; None if it has none."""
    parameters = inspect.signature(inspect.unwrap(forward)).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def with_cache(model: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """Return `cache` as the keyword argument by which `model` takes it: `model(ids, **with_cache(model, cache))`.

    Args:
        model: A transformers model, or one that PEFT wraps.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = cache_argument(type(inner).forward)
    if name is None:
        raise ValueError(f"{type(inner).__name__} takes no cache")
    return {name: cache}
