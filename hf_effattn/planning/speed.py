"""The time of a decoding step."""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache import with_cache

PIECE = 1024  # tokens of the context that are read at a time
STEPS = 16


@torch.inference_mode()
def step_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the seconds of a decoding step behind the tokens `ids` `[T]`, the median of 16, for one row."""
    cache = DynamicCache(config=model.config)
    for piece in ids.to(model.device).split(PIECE):
        model(piece[None], **with_cache(model, cache), logits_to_keep=1)
    token, times = ids[-1:].to(model.device), []
    for _ in range(STEPS):
        started = time.perf_counter()
        model(token[None], **with_cache(model, cache), logits_to_keep=1)
        if token.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[STEPS // 2]
