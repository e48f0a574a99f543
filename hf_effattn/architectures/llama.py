"""Llama, with and without grouped-query attention."""

from __future__ import annotations

from .base import Architecture, register

LLAMA = register(Architecture(model_type="llama", config_class="LlamaConfig", attention="self_attn"))
