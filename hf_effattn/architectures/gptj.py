"""GPT-J: rotary on part of each head, and no AttentionInterface, so its projections are called from here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..integration import effattn_attention
from .base import Architecture, register


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    layer_past: Any = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `GPTJAttention.forward` with converted attention between projections and output."""
    shape = (*hidden_states.shape[:2], module.num_attention_heads, module.head_dim)
    query, key, value = (p(hidden_states).view(shape) for p in (module.q_proj, module.k_proj, module.v_proj))
    if position_ids is None:
        raise ValueError("GPT-J attention needs position_ids")
    sin, cos = module.embed_positions.to(position_ids.device)[position_ids].to(key.dtype).chunk(2, dim=-1)
    size = module.rotary_dim or module.head_dim
    query, key = (torch.cat((_rotated(x[..., :size], sin, cos), x[..., size:]), dim=-1) for x in (query, key))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, D]
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, weights = effattn_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.attn_dropout.p if module.training else 0.0,
        output_attentions=output_attentions,
        **kwargs,
    )
    output = module.out_proj(output.flatten(2))
    return nn.functional.dropout(output, module.resid_dropout.p, module.training), weights


def _rotated(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of neighbouring entries of x `[B, T, H, size]` by the angles of sin, cos `[B, T, size / 2]`."""
    sin, cos = (angle[:, :, None] for angle in (sin, cos))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


register(Architecture("gptj", attention_class="GPTJAttention", forward=forward))
