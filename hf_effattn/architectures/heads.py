"""Heads and head dimensions of an attention module, wherever its family writes them down."""

from __future__ import annotations

from typing import Any

from torch import nn

NUM_HEADS = ("num_heads", "num_attention_heads")
NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")


def head_counts(module: nn.Module, config: Any) -> tuple[int, int, int, int, int]:
    """Return query heads H, key/value heads G, the head dimensions D of queries and keys and V of values, and the size
    of the layer's input.

    The module is asked before the config, since layers of a model may differ.
    """
    heads = _first(module, NUM_HEADS) or config.num_attention_heads
    groups = getattr(module, "num_key_value_groups", None)
    if groups is not None:
        kv_heads = heads // groups
    else:
        kv_heads = _first(module, NUM_KV_HEADS) or getattr(config, "num_key_value_heads", None) or heads
    head_dim = _first(module, HEAD_DIM) or config.hidden_size // heads
    return heads, kv_heads, head_dim, getattr(module, "v_head_dim", None) or head_dim, config.hidden_size


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((getattr(module, name) for name in names if getattr(module, name, None)), None)
