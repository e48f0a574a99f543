"""What the library must know of a model family, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..registry import Registry

ARCHITECTURES: Registry[Architecture] = Registry("model type")


@dataclass(frozen=True)
class Architecture:
    """Facts of one family of causal language models whose attention goes through transformers' AttentionInterface.

    Args:
        model_type: transformers' name of the family (`config.model_type`).
        config_class: Name of its config class in the `transformers` namespace.
        attention: Name of the child module that holds the self-attention of a block.
        cache_argument: Keyword under which that module receives the cache.
        num_heads, num_kv_heads: Names of config attributes with the number of query and key/value heads.
        head_dim: Name of the attention module's attribute with the head dimension.
        position_embedding: Name of the child module that embeds learned absolute positions; None for rotary.
        cross_attention: Name of the config attribute that adds cross-attention, which is not supported; None if there
            is no such thing.
    """

    model_type: str
    config_class: str
    attention: str
    cache_argument: str = "past_key_values"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    position_embedding: str | None = None
    cross_attention: str | None = None

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        """Return the self-attention modules of `model` by layer index."""
        return {
            module.layer_idx: module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] == self.attention and hasattr(module, "layer_idx")
        }

    def heads(self, module: nn.Module, config: Any) -> tuple[int, int, int]:
        """Return query heads H, key/value heads G and head dimension D of an attention module."""
        return getattr(config, self.num_heads), getattr(config, self.num_kv_heads), getattr(module, self.head_dim)


def register(architecture: Architecture) -> Architecture:
    """Enter an architecture under its model type."""
    return ARCHITECTURES.register(architecture.model_type)(architecture)
