"""Evaluate dense and converted attention side by side: python recipes/eval.py evaluate --tasks passkey

The command `effattn`, with the embedded model as its default. `make eval` runs it on three tasks. (A script called
`evaluate` would hide the library of that name.)
"""

from __future__ import annotations

from typing import Any

import models
import torch

from hf_effattn.cli import make_app


def load(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    model, tokenizer = models.load(name, dtype)
    return model.to(device), tokenizer  # type: ignore[arg-type]


if __name__ == "__main__":
    make_app(load, models.EMBEDDED)()
