"""Single queries over keys that are stored by dimension: on a CPU in float32 two products of the heads that share keys
take three quarters of the time of PyTorch's kernel then. In 16 bits such products are slow."""

from __future__ import annotations

import torch

from ...notation import may_overwrite


def is_wanted(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether keys `[B, G, S, D]` that further queries will meet one by one should be stored so. Beams move their rows
    at each step, which would undo it: one row only."""
    shares = query.shape[0] == 1 and query.shape[1] > key.shape[1]
    return shares and key.stride(3) == 1 and _is_fast(key) and may_overwrite(key) and not torch.compiler.is_compiling()


def is_stored(key: torch.Tensor) -> bool:
    """Whether keys are stored so, and `attend` is fast."""
    return key.stride(2) == 1 and _is_fast(key)


def stored(key: torch.Tensor) -> torch.Tensor:
    """Return the same keys `[B, G, S, D]`, stored by dimension."""
    return key.transpose(2, 3).contiguous().transpose(2, 3)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of one query a head, `[B, H, 1, D]`, that sees all keys `[B, G, S, D]`."""
    rows = query.reshape(-1, query.shape[1] // key.shape[1], query.shape[3])  # [B·G, H/G, D]
    scores = torch.baddbmm(rows.new_empty(1), rows, key.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view(*query.shape[:3], -1)


def _is_fast(key: torch.Tensor) -> bool:
    return key.dtype == torch.float32 and key.device.type == "cpu"
