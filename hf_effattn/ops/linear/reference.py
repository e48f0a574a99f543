"""The definition of linear attention, quadratic and in float64: slow on purpose, the oracle of the tests."""

from __future__ import annotations

import torch

from ...recurrences import Gates
from .plan import Plan
from .state import EPS, LinearOutput, LinearState


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """Compute `((φQ φKᵀ) ∘ causal) V`, plus what the state remembers, over the same with V = 1.

    Shapes as in `hf_effattn.ops.linear.linear_attention`.
    """
    if plan.recurrence is not None:
        return _by_recurrence(query, key, value, state, plan)
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


def advance(sums: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: Gates) -> torch.Tensor:
    """Return the state `[B, G, F, V+1]` after one token, by the definition of its recurrence, in float64.

    Args:
        sums: The state before; key: φ(k) `[B, G, F]`; value: `[B, G, V]`.
        gates: Of the token, `[B, G, ·]`.
    """
    key, value = key.double(), value.double()
    if gates.log_decay is not None:
        sums = gates.log_decay.double().exp()[..., None] * sums
    if gates.strength is not None:
        value = gates.strength.double() * (value - torch.einsum("bgf,bgfv->bgv", key, sums[..., :-1]))
    value = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
    return sums + torch.einsum("bgf,bgx->bgfx", key, value)


def gates_at(gates: Gates, token: int) -> Gates:
    """Return the gates `[B, G, ·]` of one token."""
    return Gates(*(None if gate is None else gate[:, :, token] for gate in gates))


def _by_recurrence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """The same for other recurrences than the sum, one token after the other."""
    groups = query.shape[1] // key.shape[1]
    q, k, gates = plan.queries(query).double(), plan.keys(key), plan.gates(key)
    sums, reads = state.sums.double(), []
    for t in range(query.shape[2]):
        sums = advance(sums, k[:, :, t], value[:, :, t], gates_at(gates, t))
        reads.append(torch.einsum("bhf,bhfx->bhx", q[:, :, t], sums.repeat_interleave(groups, dim=1)))
    read = torch.stack(reads, dim=2)  # [B, H, T, V+1]
    by_group = read.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, G, R·T, V+1]
    output = plan.output(by_group).view(*query.shape[:3], -1)
    return LinearOutput(output.to(query.dtype), LinearState(sums.to(state.sums.dtype)))
