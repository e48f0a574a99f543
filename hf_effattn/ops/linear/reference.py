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
    if plan.recurrence is not None:
        return _decaying(query, key, value, state, plan)
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


def _decaying(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """The same for a state that decays, by its recurrence."""
    groups = query.shape[1] // key.shape[1]
    q, k, decay = plan.queries(query).double(), plan.keys(key).double(), plan.log_decay(key)
    assert decay is not None
    sums, outputs = state.sums.double(), []
    for t in range(query.shape[2]):
        new = torch.cat((value[:, :, t].double(), torch.ones_like(value[:, :, t, :1]).double()), dim=-1)
        sums = decay[:, :, t].double().exp()[..., None] * sums + torch.einsum("bgf,bgx->bgfx", k[:, :, t], new)
        read = torch.einsum("bhf,bhfx->bhx", q[:, :, t], sums.repeat_interleave(groups, dim=1))
        outputs.append(read[..., :-1] / read[..., -1:].clamp(min=EPS))
    return LinearOutput(torch.stack(outputs, dim=2).to(query.dtype), LinearState(sums.to(state.sums.dtype)))
