"""What commands share: how models are named and loaded, how wishes are read, and how errors are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

Loader = Callable[[str, torch.dtype, str], tuple[Any, Any]]
DTYPES = ("float32", "bfloat16", "float16")
errors = Console(stderr=True)


def load(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Load a model, converted ones as they were saved, and its tokenizer, from the Hub or a folder."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device), AutoTokenizer.from_pretrained(name)  # type: ignore[arg-type]


def check_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; valid: {', '.join(DTYPES)}")
    return getattr(torch, name)


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def length_of(text: str) -> int:
    """Read a number of tokens as users write it: 4096, 4k."""
    digits, factor = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    if not digits.isdecimal():
        raise ValueError(f"a length is a number of tokens such as 4096 or 4k; got {text!r}")
    return int(digits) * factor


@contextmanager
def told_plainly() -> Iterator[None]:
    """Tell what users can put right without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        errors.print(Text.assemble(("error:", "red"), f" {error}"))
        raise typer.Exit(2) from error
