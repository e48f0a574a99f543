"""The attention function that transformers calls in converted layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.output_capturing import _active_collector

from ..cache import EffAttnCacheLayer
from .masks import read_mask
from .packing import documents_of, read_lengths

NAME = "hf_effattn"

# Keywords that reach the attention function and change nothing about its mathematics here.
HARMLESS = frozenset(
    {
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "ignore_index",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "seq_idx",
        "shift_labels",
        "sliding_window",
    }
)

# What no attention computes with: switches, names, and what `transformers serve` hands to `generate`.
HARMLESS_TYPES = (bool, str, PreTrainedTokenizerBase)


def effattn_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    effattn_layer: EffAttnCacheLayer | None = None,
    effattn_rotary: Any = None,
    effattn_gates: torch.Tensor | None = None,
    effattn_positions: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute a converted layer through its mechanism, `module.effattn`.

    Args:
        query: `[B, H, T, D]`; key `[B, G, T, D]`; value `[B, G, T, V]`, after rotary, heads not repeated.
        attention_mask: None, segments, or one of transformers' masks; see `read_mask`.
        effattn_layer: The cache layer bound to this call; None without a cache.
        effattn_rotary: The angles by which queries and keys were rotated, where the mechanism asks for them.
        effattn_gates: What the mechanism read from the layer's input, where it does.
        effattn_positions: `position_ids` of a call without a cache, if the layer got them.
        cu_seq_lens_q: Where packed documents begin, as collators tell flash kernels; see `read_lengths`.
        cu_seq_lens_k: The same.

    Returns:
        Output `[B, T, H, V]`, contiguous, and the attention weights `[B, H, T, T]` if they are asked for and there is
        no past.

    Raises:
        ValueError: for anything that cannot be honoured.
    """
    if not hasattr(module, "effattn"):
        raise ValueError(f"attn_implementation {NAME!r} is set by model.convert_attention(...), not by name")
    _refuse(module, is_causal, kwargs)
    num_tokens = query.shape[2]
    num_seen = 0
    if effattn_layer is not None:
        effattn_layer.claim(num_tokens)
        num_seen = effattn_layer.num_seen - num_tokens
    wants_weights = _wants_weights(output_attentions)
    if wants_weights and num_seen:
        raise ValueError(
            f"output_attentions=True was given while {num_seen} tokens are in the cache: a state of constant size has "
            "no weights over them. Attention weights exist for a whole text at once, with no cache or an empty one"
        )
    segments = read_mask(attention_mask, num_tokens, num_seen, kwargs.get("sliding_window"))
    if segments is None or segments.dtype == torch.bool:
        documents = documents_of(effattn_positions, segments)
        segments = segments if documents is None else documents.expand(query.shape[0], -1)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        segments = read_lengths(segments, cu_seq_lens_q, cu_seq_lens_k, query)
    if segments is not None and effattn_layer is not None and segments.dtype != torch.bool:
        raise ValueError("documents packed into one row cannot share a cache; pass use_cache=False")
    dtype = _common_dtype(query, key, value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mechanism: Any = module.effattn
    before = None
    if mechanism.before_rotary or mechanism.rolls:
        undo = mechanism.undo_rotary
        before = (query, key) if undo is None else undo(query, key, effattn_rotary)
    attend = functools.partial(
        mechanism,
        query,
        key,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        segments=segments,
        dropout=dropout,
        before_rotary=before,
        gates=effattn_gates,
    )
    weights = None
    with torch.autocast(query.device.type, enabled=False):
        if not wants_weights or effattn_layer is not None:
            output = attend(value, cache_layer=effattn_layer)
        if wants_weights:
            weights = attention_weights(attend, value)
            # The output comes from the weights, so that gradients reach them.
            output = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return output.transpose(1, 2).contiguous(), weights


def _wants_weights(output_attentions: bool | None) -> bool:
    """Whether the caller asks for attention weights, by a keyword or through transformers' collector of outputs."""
    collected = _active_collector.get()
    return bool(output_attentions) or (collected is not None and "attentions" in collected)


def attention_weights(attend: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """Return the attention weights `[B, H, T, T]` of a text without a past.

    Every mechanism is linear in the values, so its weights are its output for the identity matrix as values, which
    comes in parts of V columns.

    Args:
        attend: Computes the mechanism's output `[B, H, T, V]` from values `[B, G, T, V]`.
        value: `[B, G, T, V]`, for its shape and dtype.
    """
    batch, groups, tokens, width = value.shape
    columns = -(-tokens // width) * width
    identity = torch.eye(tokens, columns, dtype=value.dtype, device=value.device).expand(batch, groups, -1, -1)
    parts = [attend(part) for part in identity.split(width, dim=3)]
    return torch.cat(parts, dim=3)[..., :tokens]


def _common_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)


def _refuse(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS and not isinstance(given, HARMLESS_TYPES):
            raise ValueError(
                f"layer {getattr(module, 'layer_idx', '?')} was called with {name}={type(given).__name__}, which "
                f"changes attention in a way converted layers do not support (they know {', '.join(sorted(HARMLESS))})"
            )
    if is_causal is False:
        raise ValueError("converted layers are causal; is_causal=False is not supported")
