"""What a hybrid attention is made of, besides its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class HybridOptions(NamedTuple):
    """The constants and learned parts of one hybrid layer.

    Args:
        query_map: φ for queries, `[B, H, T, D] -> [B, H, T, F]`.
        key_map: φ for keys, `[B, G, T, D] -> [B, G, T, F]`.
        bias: b `[H]`, added to the logarithm of the linear part's mass: very negative closes the linear part.
        window: Visible keys of the softmax part, the query's own included.
        num_sinks: First tokens of each row, which stay in the softmax part.
        scale: Factor of the softmax scores, usually 1/√D.
        chunk_size: Tokens of one chunk of the parallel form.
    """

    query_map: Callable[[torch.Tensor], torch.Tensor]
    key_map: Callable[[torch.Tensor], torch.Tensor]
    bias: torch.Tensor
    window: int
    num_sinks: int
    scale: float
    chunk_size: int = 64
