"""Linear attention for training: chunks forward, and a backward pass of its own that keeps little and recomputes.

Autograd through the chunks would keep every feature and every product of a chunk. Here only queries, keys, values, the
output, its denominators and one state a segment are kept; features are mapped again on the way back.

With `g = [do/den, −(do·o)/den]` as the gradient of numerator and denominator, `R` the sum of `φ(q) gᵀ` over all later
chunks, `P` the state before a chunk and `v` with its column of ones, the gradients of one chunk are

    dφ(q) = tril(g vᵀ) φ(k) + g Pᵀ,   dφ(k) = tril(g vᵀ)ᵀ φ(q) + v Rᵀ,   dv = tril(φ(q) φ(k)ᵀ)ᵀ g + φ(k) R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..blocks import call_with, parameters_of
from ..collector import Collector
from ..folding import fold, unfold
from .plan import Plan
from .segment import Segment, attend, fold_segment, segments, states_before, sums_after, within_chunk
from .state import EPS, LinearOutput, LinearState

SEGMENT_BYTES = 1024  # as in `segment`, but the backward pass needs more for each token than the forward pass


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute as `chunked.linear_attention` does, with gradients for all tensors and the maps' parameters."""
    output, carry = Chunked.apply(plan, query, key, value, state.sums, *parameters_of(plan.modules))
    return LinearOutput(output, LinearState(carry))


class Chunked(torch.autograd.Function):
    """The pass forward keeps for the pass back: inputs, output, denominators, and the state before each segment."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        carry: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        collector = Collector(query, value.shape[-1])
        ctx.plan, ctx.cuts = plan, segments(query, plan.chunk, SEGMENT_BYTES)
        carries, denominators = [], []
        for start, end in ctx.cuts:
            carries.append(carry)
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            segment = fold_segment(q, k, v, plan.part(start, end))
            before, carry = states_before(segment, carry)
            sums = attend(segment, before)
            denominators.append(sums[..., -1:].clone())
            collector.add_quotient(sums, EPS, plan.chunk, end - start)
        output = collector.result()
        ctx.save_for_backward(query, key, value, output, *carries, *denominators, *parameters)
        return output, carry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, after: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, output, *others = ctx.saved_tensors
        plan, number = ctx.plan, len(ctx.cuts)
        carries, denominators, parameters = others[:number], others[number : 2 * number], others[2 * number :]
        grads = [torch.empty_like(x) for x in (query, key, value)]
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        with torch.autocast(query.device.type, enabled=False):
            for index in reversed(range(number)):
                start, end = ctx.cuts[index]
                tensors = [x[:, :, start:end] for x in (query, key, value, output, grad_output)]
                found, of_parameters, after = _segment_backward(
                    tensors, plan.part(start, end), parameters, carries[index], denominators[index], after
                )
                for whole, grad in zip(grads, found, strict=True):
                    whole[:, :, start:end] = grad
                sums = [b if a is None else a + b for a, b in zip(sums, of_parameters, strict=True)]
        return None, *grads, after, *sums


def _segment_backward(
    tensors: list[torch.Tensor],
    plan: Plan,
    parameters: list[torch.Tensor],
    carry: torch.Tensor,
    denominator: torch.Tensor,
    after: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return gradients of one segment's query, key and value, of the parameters, and of the state before it.

    Args:
        tensors: Query, key, value, output and its gradient, of the tokens of the segment.
        parameters: Those of the feature maps.
        carry: The state before the segment; after: the gradient of the state after it.
        denominator: Folded `[B·N, G, R·C, 1]`.
    """
    query, key, value, output, grad_output = tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, *parameters)]
        mapped = call_with(plan.modules, leaves[2:], fold_segment, leaves[0], leaves[1], value, plan)
    segment = Segment(mapped.query.detach(), mapped.key.detach(), mapped.value)
    g = _gradient_of_sums(output, grad_output, denominator, plan.chunk).to(segment.query.dtype)
    grad_query, grad_key, grad_value, before = _gradients_in_chunks(segment, g, carry, after)
    found = torch.autograd.grad([mapped.query, mapped.key], leaves, [grad_query, grad_key], allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found, strict=True)]
    return [*grads[:2], unfold(grad_value, value.shape[0], value.shape[2])], grads[2:], before


def _gradient_of_sums(
    output: torch.Tensor, grad_output: torch.Tensor, denominator: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return `g`, the gradient of numerators and denominators `[B·N, G, R·C, V+1]`, in at least float32."""
    wide = torch.promote_types(denominator.dtype, torch.float32)
    o, do = (fold(x, chunk).view(*denominator.shape[:3], -1).to(wide) for x in (output, grad_output))
    factor = denominator.to(wide).clamp(min=EPS).reciprocal()
    last = (do * o).sum(dim=-1, keepdim=True).masked_fill(denominator < EPS, 0.0)  # a clamped one has no gradient
    return torch.cat((do, -last), dim=-1) * factor


def _gradients_in_chunks(
    segment: Segment, g: torch.Tensor, carry: torch.Tensor, after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of mapped queries and keys, of values, and of the state before the segment."""
    q, k, v = segment[:3]
    before = states_before(segment, carry)[0].to(q.dtype)
    later, total = sums_after(torch.matmul(q.transpose(2, 3), g), after)
    later = later.to(q.dtype)
    products, weights = within_chunk(g, v), within_chunk(q, k)
    grad_query = _sum_of_products(products, k, g, before.transpose(2, 3))
    grad_key = _sum_of_products(products.transpose(2, 3), q, v, later.transpose(2, 3))
    grad_value = _sum_of_products(weights.transpose(2, 3), g, k, later)[..., :-1]
    return grad_query, grad_key, grad_value, total


def _sum_of_products(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """`a b + c d` for batches of matrices `[·, G, ·, ·]`."""
    first = torch.matmul(c, d)
    return torch.baddbmm(first.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).view(first.shape)
