"""A tiny random config of any family: small values for whatever sizes its config class has.

`python tests/families.py` writes the list of families in the README anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from hf_effattn import supported_models
from hf_effattn.architectures import REFUSED
from hf_effattn.targets import choose_layers, find_targets

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
    if model_type == "longcat_flash":  # two attentions in each
        options["num_layers"] = NUM_LAYERS // 2
    kinds = list(dict.fromkeys(vars(default).get("layer_types") or ()))
    if kinds:
        options["layer_types"] = (kinds * NUM_LAYERS)[:NUM_LAYERS]
    return kind(**{**options, **changes})


README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(?<=<!-- families -->\n).*(?=<!-- end of families -->)", re.DOTALL)


def listing() -> str:
    """The supported and refused families as Markdown: what a conversion without `layers=` converts in each."""
    groups: dict[str, list[str]] = {}
    for name in filter(CONFIG_MAPPING.__contains__, supported_models()):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(name))
        targets = find_targets(model)
        if len(choose_layers(targets, None, None)) == NUM_LAYERS:
            kind = "every layer"
        elif len(targets.modules) == NUM_LAYERS:
            kind = "layers of full attention; those with a window or chunks of their own stay"
        else:
            kind = "layers of full attention; recurrent and convolutional ones stay"
        groups.setdefault(kind, []).append(name)
    reasons: dict[str, list[str]] = {}
    for name in filter(CONFIG_MAPPING.__contains__, REFUSED):
        reasons.setdefault(REFUSED[name], []).append(name)
    lines = ["| by default converts | families (`config.model_type`) |", "|---|---|"]
    lines += [f"| {kind} | {', '.join(names)} |" for kind, names in sorted(groups.items())]
    lines += ["", "| refused, with this reason | families |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(sorted(names))} |" for reason, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(SECTION.sub(lambda _: listing(), README.read_text()))
