"""GPT-2: fused Conv1D projections (they stay as they are) and learned absolute positions (an end to the text)."""

from __future__ import annotations

from .base import Architecture, register

GPT2 = register(
    Architecture(
        model_type="gpt2",
        config_class="GPT2Config",
        attention="attn",
        num_kv_heads="num_attention_heads",
        position_embedding="wpe",
        cross_attention="add_cross_attention",
    )
)
