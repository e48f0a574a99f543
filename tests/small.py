"""A tiny model that reads words, for tests of what works on texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from matrix import tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROSE = (Path(__file__).parent / "data" / "prose.txt").read_text(encoding="utf-8")


def small_tokenizer(text: str = PROSE) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words of `text`, single characters for others."""
    pieces = sorted({*re.findall(r"[A-Za-z]+|[^A-Za-z]", text), *map(chr, range(32, 127)), "\n"})
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<eos>", "<unk>", *pieces])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def small_model(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Any:
    """Return a random tiny Llama for the tokenizer, always with the same weights."""
    torch.manual_seed(1)
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, **changes}
    return AutoModelForCausalLM.from_config(tiny_config("llama-gqa", **options)).eval()
