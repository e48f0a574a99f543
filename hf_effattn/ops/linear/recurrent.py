"""Linear attention one token at a time: the form of decoding."""

from __future__ import annotations

import torch
from torch.nn import functional

from .plan import Plan
from .state import EPS, LinearOutput, LinearState


def step(
    key: torch.Tensor,
    value: torch.Tensor,
    state: LinearState,
    in_place: bool = False,
    log_decay: torch.Tensor | None = None,
) -> LinearState:
    """Return the state after one more token.

    Args:
        key: φ(k) `[B, G, 1, F]`.
        value: `[B, G, 1, V]`.
        in_place: Whether the given state may be overwritten.
        log_decay: `log α` `[B, G, 1, 1 or F]`; None without decay.
    """
    sums = state.sums
    if log_decay is not None:
        factor = log_decay.exp().to(sums.dtype).transpose(2, 3)
        sums = sums.mul_(factor) if in_place else sums * factor
    k, v = key.to(sums.dtype).transpose(2, 3), functional.pad(value.to(sums.dtype), (0, 1), value=1.0)
    return LinearState(sums.addcmul_(k, v) if in_place else torch.addcmul(sums, k, v))


def read(query: torch.Tensor, state: LinearState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numerator `φ(q)ᵀ state.kv` `[B, G, R, V]` and denominator `φ(q)ᵀ state.normalizer` `[B, G, R, 1]`.

    Args:
        query: φ(q) of one token `[B, H, 1, F]`.
    """
    batch, heads, _, features = query.shape
    kv_heads = state.sums.shape[1]
    sums = torch.matmul(query.to(state.sums.dtype).view(batch, kv_heads, heads // kv_heads, features), state.sums)
    return sums[..., :-1], sums[..., -1:]


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan, in_place: bool = False
) -> LinearOutput:
    """Compute token by token; arguments as in `hf_effattn.ops.linear.linear_attention`.

    Args:
        in_place: Whether the given state may be overwritten.
    """
    queries, keys, decay = plan.queries(query), plan.keys(key), plan.log_decay(key)
    outputs = []
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        log_decay = None if decay is None else decay[:, :, now]
        state = step(keys[:, :, now], value[:, :, now], state, in_place, log_decay)
        numerator, denominator = read(queries[:, :, now], state)
        outputs.append((numerator / denominator.clamp(min=EPS)).to(query.dtype).view(*query.shape[:2], 1, -1))
    return LinearOutput(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), state)
