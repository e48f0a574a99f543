"""Linear attention in chunks: quadratic inside a chunk of C tokens, a recurrent state between chunks.

A *segment* of several chunks is computed at once and segments follow each other, so scratch memory doesn't grow with
the text. Raw queries and keys are folded first and mapped then, so features are never copied: the R query heads of a
key/value head become the rows of one matrix product (keys and values are not repeated). The normaliser rides along as a
column of ones, and the states before each chunk come from one product with a triangular matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..blocks import Blocks, Tensors, in_blocks, learns
from ..collector import Collector
from ..folding import unfold
from . import delta, gradient
from .plan import Plan
from .segment import Segment, attend, fold_segment, segments, states_before
from .state import EPS, LinearOutput, LinearState

Compute = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Plan, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]  # query, key, value, plan and state before -> output and state after


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute in chunks; arguments as in `hf_effattn.ops.linear.linear_attention`."""
    is_learning = learns((query, key, value, *state), plan.modules)
    if is_learning and plan.recurrence is None and not torch.compiler.is_compiling():
        return gradient.linear_attention(query, key, value, state, plan)
    if is_learning or plan.is_delta:
        return in_blocks_of(segment_output, query, key, value, state, plan)
    return in_segments(query, key, value, state, plan)


def in_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute segment by segment, outputs written into place."""
    collector = Collector(query, value.shape[-1])
    carry = state.sums
    for start, end in segments(query, plan.chunk):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        sums, carry = read_segment(fold_segment(q, k, v, plan.part(start, end)), carry)
        collector.add_quotient(sums, EPS, plan.chunk, end - start)
    return LinearOutput(collector.result(), LinearState(carry))


def in_blocks_of(
    segment: Compute,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: LinearState,
    plan: Plan,
) -> LinearOutput:
    """Compute segment by segment, for training and for outputs that are no quotients.

    Args:
        segment: Computes one of them, such as `segment_output`.
    """
    cuts = segments(query, plan.chunk)

    def compute(
        block: int, carry: torch.Tensor | None, parts: Tensors, _: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert carry is not None
        (q, k, v), (start, end) = parts, cuts[block]
        return segment(q, k, v, plan.part(start, end), carry)

    blocks = Blocks(compute, [(cut, cut, cut) for cut in cuts], plan.modules, value.shape[-1])
    output, carry = in_blocks(blocks, state.sums, (query, key, value))
    assert carry is not None
    return LinearOutput(output, LinearState(carry))


def segment_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of one segment `[B, H, T, V]` and the state after it `[B, G, F, V+1]`.

    Args:
        carry: The state before it.
    """
    sums, carry = read_segment(fold_segment(query, key, value, plan), carry)
    output = plan.output(sums).view(-1, query.shape[1], plan.chunk, value.shape[-1])
    return unfold(output, query.shape[0], query.shape[2]).to(query.dtype), carry


def read_segment(segment: Segment, carry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the queries of a segment read, numerators and denominators `[B·N, G, R·C, V+1]`, and the state after
    the segment `[B, G, F, V+1]`.

    Args:
        carry: The state before it.
    """
    if segment.strength is None:
        before, carry = states_before(segment, carry)
    else:
        segment, before, carry = delta.states_before(segment, carry)
    return attend(segment, before), carry
