"""One softmax over a window, sinks and the linear past, with a backward pass of its own.

The linear past is one more column beside the keys: its logit is `ℓ_lin` and its value `o_lin`. Autograd would keep and
fill a matrix of scores for each step of this; here the gradient of the softmax, `dS = P ∘ (dP − (dO · O))`, is made in
one, and each chunk's gradients of keys go where the keys came from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..blocks import learns
from .logit import is_relative
from .options import HybridOptions


def joined(
    options: HybridOptions,
    hidden: torch.Tensor,
    query: torch.Tensor,
    near: tuple[torch.Tensor, torch.Tensor],
    sinks: tuple[torch.Tensor, torch.Tensor],
    past: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the output `[B·N, G, R·C, V]` in the dtype of `past`.

    Args:
        options: Window, chunk, scale, join.
        hidden: Zero for what a query sees and minus infinity for the rest, `[R·C or B·N·G, R·C, W+C+sinks+1]`.
        query: Folded `[B·N, G, R·C, D]`.
        near: Keys and values `[B, G, W+N·C, ·]`, from one window before the first query.
        sinks: Keys and values `[B, G, sinks, ·]`.
        past: The linear past: its logit `[B·N, G, R·C, 1]` and its value `[B·N, G, R·C, V]`.
    """
    tensors = (query, *near, *sinks, *past)
    if learns(tensors) and not torch.compiler.is_compiling():
        found: torch.Tensor = _Joined.apply(options, hidden, *tensors)
        return found
    return _forward(options, hidden, *tensors)[0]


def _forward(
    options: HybridOptions,
    hidden: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_key: torch.Tensor,
    sink_value: torch.Tensor,
    logit: torch.Tensor,
    past: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the output, the weights `[B·N, G, R·C, W+C+sinks+1]`, and which score was the largest of its row, as one
    over their number, where the past is weighed relative to it."""
    columns = _columns(key, sink_key, options).transpose(1, 2)
    products = torch.baddbmm(hidden, query.flatten(0, 1), columns, alpha=options.scale)
    scores = products.view(*query.shape[:3], -1).to(past.dtype)
    largest = None
    if is_relative(options.join):
        own = scores[..., :-1].clone()  # since the logit is written beside them
        peak = own.amax(dim=-1, keepdim=True)
        logit = logit + peak
        largest = own == peak
        largest = largest / largest.sum(dim=-1, keepdim=True)
    scores[..., -1:] = logit
    weights = scores.softmax(dim=-1)
    output = torch.bmm(weights.to(query.dtype).flatten(0, 1), _columns(value, sink_value, options))
    output = output.view(past.shape).to(past.dtype)
    return torch.addcmul(output, weights[..., -1:], past), weights, largest


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: HybridOptions, hidden: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        output, weights, largest = _forward(options, hidden, *tensors)
        ctx.options, ctx.largest = options, largest
        ctx.save_for_backward(*tensors, output, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, sink_key, sink_value, logit, past, output, weights = ctx.saved_tensors
        options, dtype = ctx.options, query.dtype
        rounded = grad.to(dtype).flatten(0, 1)
        slopes = torch.bmm(rounded, _columns(value, sink_value, options).transpose(1, 2)).view(weights.shape)
        slopes = slopes.to(weights.dtype)
        slopes[..., -1:] = (grad * past).sum(dim=-1, keepdim=True)
        slopes.sub_((grad * output).sum(dim=-1, keepdim=True)).mul_(weights)  # of the scores
        grad_logit = slopes[..., -1:].clone()
        if ctx.largest is not None:
            slopes[..., :-1] += ctx.largest * grad_logit
        by_key = slopes.to(dtype).flatten(0, 1)  # the column of the past meets a zero, and its gradient is dropped
        grad_query = torch.bmm(by_key, _columns(key, sink_key, options)).mul_(options.scale).view(query.shape)
        grad_columns = torch.bmm(by_key.transpose(1, 2), query.flatten(0, 1)).mul_(options.scale)
        grad_key, grad_sink_key = _scattered(grad_columns, key, sink_key, options)
        grad_columns = torch.bmm(weights.to(dtype).flatten(0, 1).transpose(1, 2), rounded)
        grad_value, grad_sink_value = _scattered(grad_columns, value, sink_value, options)
        grad_past = weights[..., -1:] * grad
        return None, None, grad_query, grad_key, grad_value, grad_sink_key, grad_sink_value, grad_logit, grad_past


def _columns(x: torch.Tensor, sinks: torch.Tensor, options: HybridOptions) -> torch.Tensor:
    """Return what the queries of each chunk meet, `[B·N·G, W+C+sinks+1, ·]`: the entries of x `[B, G, W+N·C, ·]` from
    one window before the chunk on, the sinks `[B, G, sinks, ·]`, and zeros in the place of the linear past."""
    span = options.window + options.chunk_size
    near = x.unfold(2, span, options.chunk_size).permute(0, 2, 1, 4, 3)  # [B, N, G, W+C, ·]
    others = functional.pad(sinks.to(x.dtype), (0, 0, 0, 1))[:, None].expand(-1, near.shape[1], -1, -1, -1)
    return torch.cat((near, others), dim=3).flatten(0, 2)


def _scattered(
    grad: torch.Tensor, x: torch.Tensor, sinks: torch.Tensor, options: HybridOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and of the sinks from that of their columns."""
    grad = grad.view(x.shape[0], -1, x.shape[1], *grad.shape[1:])  # [B, N, G, W+C+sinks+1, ·]
    chunk, span, total = options.chunk_size, options.window + options.chunk_size, torch.zeros_like(x)
    for low in range(0, span, chunk):  # of each chunk the entries that follow each other in x
        high = min(low + chunk, span)
        chunks = total[:, :, low:].unfold(2, high - low, chunk)[:, :, : grad.shape[1]]  # [B, G, N, ·, ≤C]
        chunks += grad[:, :, :, low:high].permute(0, 2, 1, 4, 3)
    return total, grad[:, :, :, span:-1].sum(dim=1).to(sinks.dtype)
