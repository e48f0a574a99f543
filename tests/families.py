"""A tiny random config of any family: small values for whatever sizes its config class has."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 97
NUM_LAYERS = 2
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "is_decoder": True,
    "rotary_dim": 8,
    # layers
    "num_hidden_layers": NUM_LAYERS,
    "decoder_layers": NUM_LAYERS,
    "encoder_layers": NUM_LAYERS,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    # embeddings of each layer
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a config of the family whose model has some 100,000 parameters, and two layers of each kind it mixes."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    names = {*vars(default), *kind.attribute_map, *getattr(kind, "__annotations__", ())}
    options = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention: as many key heads as query heads, and head_dim is that of rotary
        options.update({"head_dim": 8, "num_key_value_heads": 4} if "head_dim" in names else {"num_key_value_heads": 4})
    if model_type == "whisper":  # an alias there
        options.pop("num_key_value_heads", None)
    kinds = list(dict.fromkeys(vars(default).get("layer_types") or ()))
    if kinds:
        options["layer_types"] = (kinds * NUM_LAYERS)[:NUM_LAYERS]
    return kind(**{**options, **changes})
