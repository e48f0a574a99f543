"""Falcon: queries, keys and values from one projection in one of three layouts, and no AttentionInterface."""

from __future__ import annotations

from typing import Any

import torch

from ..integration import effattn_attention
from .base import Architecture, register
from .families import ALIBI


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `FalconAttention.forward` with converted attention between projections and output."""
    query, key, value = _split(module, module.query_key_value(hidden_states))
    if alibi is not None or position_embeddings is None:
        raise ValueError(f"this Falcon cannot be converted: {ALIBI}")
    query, key = (_rotated(x, *position_embeddings) for x in (query, key))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, weights = effattn_attention(
        module, query, key, value, attention_mask, output_attentions=output_attentions, **kwargs
    )
    return module.dense(output.flatten(2)), weights


def _split(module: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused projection `[B, T, ·]` into query `[B, H, T, D]`, key and value `[B, G, T, D]`."""
    batch, tokens, _ = fused.shape
    if not module.new_decoder_architecture and module.multi_query:
        heads = fused.view(batch, tokens, module.num_heads + 2, module.head_dim).transpose(1, 2)
        return heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    groups = module.num_kv_heads if module.new_decoder_architecture else module.num_heads
    heads = fused.view(batch, tokens, groups, -1, module.head_dim)  # per group: its queries, a key, a value
    query = heads[:, :, :, :-2].flatten(2, 3)
    return query.transpose(1, 2), heads[:, :, :, -2].transpose(1, 2), heads[:, :, :, -1].transpose(1, 2)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x `[B, H, T, D]`, whose halves make the pairs, by cos, sin `[B, T, D]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


register(
    Architecture(
        "falcon",
        attention_class="FalconAttention",
        forward=forward,
        refusal=lambda config: ALIBI if config.alibi else None,
    )
)
