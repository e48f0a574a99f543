"""Linear attention one token at a time: the form of decoding."""

from __future__ import annotations

import torch
from torch.nn import functional

from ...recurrences import Gates
from .plan import Plan
from .state import LinearOutput, LinearState

NO_GATES = Gates()


def step(
    key: torch.Tensor,
    value: torch.Tensor,
    state: LinearState,
    in_place: bool = False,
    gates: Gates = NO_GATES,
) -> LinearState:
    """Return the state after one more token.

    Args:
        key: φ(k) `[B, G, 1, F]`.
        value: `[B, G, 1, V]`.
        in_place: Whether the given state may be overwritten.
        gates: Of the token, `[B, G, 1, ·]`.
    """
    sums, v = state.sums, value.to(state.sums.dtype)
    k = key.to(sums.dtype).transpose(2, 3)
    if gates.log_decay is not None:
        factor = gates.log_decay.exp().to(sums.dtype).transpose(2, 3)
        sums = sums.mul_(factor) if in_place else sums * factor
    if gates.strength is not None:
        recalled = torch.matmul(k.transpose(2, 3), sums[..., :-1])
        v = (v - recalled) * gates.strength.to(sums.dtype)
    v = functional.pad(v, (0, 1), value=1.0)
    return LinearState(sums.addcmul_(k, v) if in_place else torch.addcmul(sums, k, v))


def read(query: torch.Tensor, state: LinearState) -> torch.Tensor:
    """Return numerator `φ(q)ᵀ state.kv` and, as last column, denominator `φ(q)ᵀ state.normalizer`, `[B, G, R, V+1]`.

    Args:
        query: φ(q) of one token `[B, H, 1, F]`.
    """
    batch, heads, _, features = query.shape
    kv_heads = state.sums.shape[1]
    return torch.matmul(query.to(state.sums.dtype).view(batch, kv_heads, heads // kv_heads, features), state.sums)


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan, in_place: bool = False
) -> LinearOutput:
    """Compute token by token; arguments as in `hf_effattn.ops.linear.linear_attention`.

    Args:
        in_place: Whether the given state may be overwritten.
    """
    queries, keys, gates = plan.queries(query), plan.keys(key), plan.gates(key)
    outputs = []
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        own = Gates(*(None if gate is None else gate[:, :, now] for gate in gates))
        state = step(keys[:, :, now], value[:, :, now], state, in_place, own)
        output = plan.output(read(queries[:, :, now], state))
        outputs.append(output.to(query.dtype).view(*query.shape[:2], 1, -1))
    return LinearOutput(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), state)
