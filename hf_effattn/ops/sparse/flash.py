"""PyTorch's fused softmax attention on a CPU, with the log-sum-exp that merging several of them needs.

`scaled_dot_product_attention` computes the log-sum-exp too, but keeps it to itself; the operator below it returns it.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional
from torch.torch_version import TorchVersion

from ..folding import heads_as_rows

# Before, the operator takes fewer key/value than query heads, too, but reads and writes past their end.
KNOWS_GROUPS = TorchVersion(torch.__version__) >= "2.9"

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


def one_width(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value with zeros behind the narrower of them: the operator wants one last dimension."""
    width = max(query.shape[3], value.shape[3])
    q, k, v = (functional.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (query, key, value))
    return q, k, v


def whole_lines(number: int, dtype: torch.dtype) -> int:
    """Return a number of keys, at least this one, whose scores fill lines of 64 bytes: products of 136 keys take a
    tenth longer than those of 144. Scores are in float32 where dtypes are narrower."""
    line = 64 // torch.promote_types(dtype, torch.float32).itemsize
    return -(-number // line) * line


def merge_(
    first: torch.Tensor, logsumexp: torch.Tensor, second: torch.Tensor, other: torch.Tensor, last: bool = False
) -> None:
    """Write into `first` and `logsumexp` what queries get from two disjoint sets of keys, `o₁` where both are minus
    infinity: `o = e^{ℓ₁ − ℓ} o₁ + e^{ℓ₂ − ℓ} o₂` with `ℓ = log(e^{ℓ₁} + e^{ℓ₂})`.

    Args:
        first, second: Outputs `[..., V]`; logsumexp, other: theirs `[...]`, minus infinity where a query saw nothing.
        last: Whether nobody asks for ℓ, which is then left as it was.
    """
    weight = (other - logsumexp).sigmoid_().nan_to_num_(nan=0.0)[..., None]  # e^{ℓ₂ − ℓ}
    if first.dtype == weight.dtype:
        first.lerp_(second.to(weight.dtype), weight)
    else:
        first.copy_(first.to(weight.dtype).lerp_(second.to(weight.dtype), weight))
    if not last:
        torch.logaddexp(logsumexp, other, out=logsumexp)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, T, D]` and the log-sum-exp of the scores `[B, H, T]`, in at least float32; what it is
    where all is hidden has no meaning.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`.
        hidden: Added to the scores, in the dtype of the query, `[1, 1 or H, T, S]`; None where all is seen.
    """
    (rows,), hidden = _as_rows([query], key.shape[1], hidden)
    output, logsumexp = _FORWARD(rows, key, value, 0.0, False, attn_mask=hidden, scale=scale)  # type: ignore[misc]
    return output.reshape(*query.shape[:3], -1), logsumexp.reshape(query.shape[:3])


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value.

    Args:
        output, logsumexp: Of all keys of the queries, these and others.
    """
    (grad, q, o, total), hidden = _as_rows([grad_output, query, output, logsumexp], key.shape[1], hidden)
    tensors = (grad, q, key, value, o, total.contiguous())
    found = _BACKWARD(*tensors, 0.0, False, attn_mask=hidden, scale=scale)  # type: ignore[misc]
    return found[0].reshape(query.shape), *found[1:]


def _as_rows(
    of_queries: list[torch.Tensor], groups: int, hidden: torch.Tensor | None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return what belongs to queries, `[B, H, T, ·]`, and their mask in the form in which the operator meets keys of
    `groups` heads: the query heads of each as rows, but with a mask, which would have to repeat, as they are where the
    operator knows groups."""
    if hidden is not None and KNOWS_GROUPS:
        return of_queries, hidden
    if hidden is not None:
        each = of_queries[0].shape[1] // groups
        by_head = hidden.expand(-1, each, -1, -1) if hidden.shape[1] == 1 else hidden
        hidden = heads_as_rows(by_head, by_head.shape[1] // each)
    return [heads_as_rows(x, groups) for x in of_queries], hidden
