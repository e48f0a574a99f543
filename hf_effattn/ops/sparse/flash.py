"""PyTorch's fused softmax attention on a CPU, with the log-sum-exp that merging several of them needs.

`scaled_dot_product_attention` computes the log-sum-exp too, but keeps it to itself; the operator below it returns it.
"""

from __future__ import annotations

import functools

import torch

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


@functools.cache
def is_available() -> bool:
    """Whether this PyTorch has the operator, for grouped heads and with masks."""
    query, key, hidden = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 3, 4)
    try:
        output, logsumexp = forward(query, key, key, hidden, 1.0)
        return backward(output, query, output, logsumexp, key, key, hidden, 1.0)[1].shape == key.shape
    except (RuntimeError, TypeError):
        return False


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, T, D]` and the log-sum-exp of the scores `[B, H, T]`, in at least float32; what it is
    where all is hidden has no meaning.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`.
        hidden: Added to the scores, in the dtype of the query, `[1, 1 or H, T, S]`.
    """
    return _FORWARD(query, key, value, 0.0, False, attn_mask=hidden, scale=scale)  # type: ignore[misc]


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value.

    Args:
        output, logsumexp: Of all keys of the queries, these and others.
    """
    tensors = (grad_output, query, key, value, output, logsumexp.contiguous())
    return _BACKWARD(*tensors, 0.0, False, attn_mask=hidden, scale=scale)  # type: ignore[misc]
