"""The attention function that transformers calls in converted layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import _active_collector

from ..cache import EffAttnCacheLayer
from .masks import to_segment_ids

NAME = "hf_effattn"

# Keywords that reach the attention function and change nothing about its mathematics here.
HARMLESS = frozenset(
    {
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def effattn_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    effattn_layer: EffAttnCacheLayer | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute a converted layer through its mechanism, `module.effattn`.

    Args:
        query: `[B, H, T, D]`; key `[B, G, T, D]`; value `[B, G, T, V]`, after rotary, heads not repeated.
        attention_mask: None, segment ids, or one of transformers' masks; see `to_segment_ids`.
        effattn_layer: The cache layer bound to this call; None without a cache.

    Returns:
        Output `[B, T, H, V]`, and None in place of attention weights, which are never computed.

    Raises:
        ValueError: for anything that cannot be honoured.
    """
    if not hasattr(module, "effattn"):
        raise ValueError(f"attn_implementation {NAME!r} is set by model.convert_attention(...), not by name")
    _refuse(module, is_causal, output_attentions, kwargs)
    num_tokens = query.shape[2]
    num_seen = 0
    if effattn_layer is not None:
        effattn_layer.claim(num_tokens)
        num_seen = effattn_layer.num_seen - num_tokens
    segment_ids = to_segment_ids(attention_mask, num_tokens, num_seen)
    if segment_ids is not None and effattn_layer is not None and bool((segment_ids > 1).any()):
        raise ValueError("documents packed into one row cannot share a cache; pass use_cache=False")
    device = query.device.type
    dtype = _common_dtype(query, key, value)
    with torch.autocast(device, enabled=False):
        output = module.effattn(  # type: ignore[operator]
            query.to(dtype),
            key.to(dtype),
            value.to(dtype),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            segment_ids=segment_ids,
            cache_layer=effattn_layer,
            dropout=dropout,
        )
    return output.transpose(1, 2), None


def _common_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)


def _refuse(module: nn.Module, is_causal: bool | None, output_attentions: bool | None, kwargs: dict[str, Any]) -> None:
    collected = _active_collector.get()
    if output_attentions or (collected is not None and "attentions" in collected):
        raise ValueError(
            "converted layers compute no attention weights, so output_attentions=True cannot be honoured; call "
            "revert_attention(), or keep the layers of interest with keep_softmax="
        )
    if is_causal is False:
        raise ValueError("converted layers are causal; is_causal=False is not supported")
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS:
            raise ValueError(
                f"layer {getattr(module, 'layer_idx', '?')} was called with {name}={type(given).__name__}, which "
                f"changes attention in a way converted layers do not support (they know {', '.join(sorted(HARMLESS))})"
            )
