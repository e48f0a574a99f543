"""Linear attention in chunks: quadratic inside a chunk of C tokens, a recurrent state between chunks.

A *segment* of several chunks is computed at once and segments follow each other, so scratch memory doesn't grow with
the text. Raw queries and keys are folded first and mapped then, so features are never copied: the R query heads of a
key/value head become the rows of one matrix product (keys and values are not repeated). The normaliser rides along as a
column of ones, and the states before each chunk come from one product with a triangular matrix.
"""

from __future__ import annotations

import torch

from ..collector import Collector
from . import gradient
from .plan import Plan
from .segment import attend, fold_segment, segments, states_before
from .state import EPS, LinearOutput, LinearState


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute in chunks; arguments as in `hf_effattn.ops.linear.linear_attention`."""
    inputs = (query, key, value, *state, *plan.parameters())
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if learns and plan.recurrence is None and not torch.compiler.is_compiling():
        return gradient.linear_attention(query, key, value, state, plan)
    return in_segments(query, key, value, state, plan)


def in_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute segment by segment, by operations that autograd and the compiler understand."""
    collector = Collector(query, value.shape[-1])
    carry = state.sums
    for start, end in segments(query, plan.chunk):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        segment = fold_segment(q, k, v, plan.part(start, end))
        before, carry = states_before(segment, carry)
        collector.add_quotient(attend(segment, before), EPS, plan.chunk, end - start)
    return LinearOutput(collector.result(), LinearState(carry))
