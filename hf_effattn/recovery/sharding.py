"""Tensors that FSDP2 has shared out over processes: put together, and shared out again."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, of which each process may have a part; then all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, which is whole, shared out as `other` is; then all processes must call this."""
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor
