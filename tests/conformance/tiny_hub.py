"""Tiny random models under the names that PEFT's tests load from the Hub, as a cache folder that its client reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SIZES = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ROTARY = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
_LEARNED = {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}

# Name on the Hub, model type, options of its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", {**_ROTARY, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", _ROTARY),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", _LEARNED),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", _ROTARY),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", _LEARNED),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", {**_LEARNED, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "opt",
        {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _ROTARY),
}
REVISION = "0" * 40


def build(folder: Path) -> None:
    """Fill `folder`, a cache of the Hub's client, with what is not there yet."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, (model_type, options) in MODELS.items():
        root = folder / f"models--{name.replace('/', '--')}"
        if (root / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, bos_token_id=0, eos_token_id=1, pad_token_id=2, **options)
        snapshot = root / "snapshots" / REVISION
        AutoModelForCausalLM.from_config(config).save_pretrained(snapshot)
        _tokenizer().save_pretrained(snapshot)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(REVISION)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{number}" for number in range(996))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
