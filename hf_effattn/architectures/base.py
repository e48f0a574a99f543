"""What the library must know of a model family, as data: for most, nothing beyond its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..registry import Registry
from .seam import Seam, find_seam

ARCHITECTURES: Registry[Architecture] = Registry("model type")
CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")


@dataclass(frozen=True)
class Architecture:
    """Facts of one family of causal language models.

    The defaults hold for every family whose attention goes through transformers' AttentionInterface: its attention
    modules, heads and cache argument are found on the modules themselves.

    Args:
        model_type: transformers' name of the family (`config.model_type`).
        position_embedding: Name of the child module, a plain `nn.Embedding`, that embeds learned absolute positions;
            None for families without one.
        attention_class: Name of the attention class of a family without the AttentionInterface (in some versions of
            transformers; where a class has it, it is used).
        forward: What such a class computes in place of its own forward: `forward(module, *args, **kwargs)`.
        refusal: `refusal(config)` says why a model of the family cannot be converted, or returns None.
    """

    model_type: str
    position_embedding: str | None = None
    attention_class: str | None = None
    forward: Callable[..., Any] | None = None
    refusal: Callable[[Any], str | None] | None = None

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        """Return the causal self-attention modules of `model` by layer index.

        Raises:
            ValueError: if two modules claim one layer.
        """
        found: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            if not self._is_self_attention(name, module):
                continue
            index = module.layer_idx
            if index in found:
                raise ValueError(f"models of type {self.model_type!r} attend more than once in layer {index}")
            found[index] = module
        return found

    def seam(self, module: nn.Module) -> Seam | None:
        """Return how `module` calls the attention function; None if it is no attention that can be converted."""
        cls = type(module)
        found = find_seam(cls)  # type: ignore[arg-type]
        if found is None and cls.__name__ == self.attention_class:
            return Seam(forward=self.forward)
        return found

    def _is_self_attention(self, name: str, module: nn.Module) -> bool:
        if getattr(module, "layer_idx", None) is None or name.rpartition(".")[2] in CROSS_ATTENTION:
            return False
        seam = self.seam(module)
        return seam is not None and seam.takes_cache and getattr(module, "is_causal", True) is True


def register(architecture: Architecture) -> Architecture:
    """Enter an architecture under its model type."""
    return ARCHITECTURES.register(architecture.model_type)(architecture)
