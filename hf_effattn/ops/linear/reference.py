"""The definition of linear attention, quadratic and in float64: slow on purpose, the oracle of the tests."""

from __future__ import annotations

import torch

from .plan import Plan
from .state import EPS, LinearOutput, LinearState


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute `((φQ φKᵀ) ∘ causal) V`, plus what the state remembers, over the same with V = 1.

    Shapes as in `hf_effattn.ops.linear.linear_attention`.
    """
    groups = query.shape[1] // key.shape[1]
    q, k, v = plan.queries(query).double(), plan.keys(key).double(), value.double()
    kv, normalizer = state.kv.double(), state.normalizer.double()
    k_all, v_all = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # [B, H, T, ·]
    weights = torch.einsum("bhtf,bhsf->bhts", q, k_all).tril()
    past, mass = kv.repeat_interleave(groups, dim=1), normalizer.repeat_interleave(groups, dim=1)
    numerator = weights @ v_all + torch.einsum("bhtf,bhfv->bhtv", q, past)
    denominator = weights.sum(-1) + torch.einsum("bhtf,bhf->bht", q, mass)
    output = numerator / denominator.clamp(min=EPS)[..., None]
    new_kv = kv + torch.einsum("bgtf,bgtv->bgfv", k, v)
    new_normalizer = normalizer + k.sum(dim=2)
    dtype = state.kv.dtype
    return LinearOutput(output.to(query.dtype), LinearState.of(new_kv.to(dtype), new_normalizer.to(dtype)))
