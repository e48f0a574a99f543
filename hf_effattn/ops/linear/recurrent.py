"""Linear attention one token at a time: the form of decoding."""

from __future__ import annotations

import torch

from .plan import Plan
from .state import EPS, LinearOutput, LinearState


def step(key: torch.Tensor, value: torch.Tensor, state: LinearState) -> LinearState:
    """Return the state after one more token: key `[B,G,1,F]`, value `[B,G,1,V]`."""
    k, v = key.to(state.kv.dtype), value.to(state.kv.dtype)
    return LinearState(state.kv + k.transpose(2, 3) * v, state.normalizer + k.squeeze(2))


def read(query: torch.Tensor, state: LinearState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numerator `φ(q)ᵀ state.kv` `[B,H,1,V]` and denominator `φ(q)ᵀ state.normalizer` `[B,H,1,1]`."""
    batch, heads, _, features = query.shape
    kv_heads = state.kv.shape[1]
    q = query.to(state.kv.dtype).view(batch, kv_heads, heads // kv_heads, features)
    numerator = torch.matmul(q, state.kv)  # [B, G, R, V]
    denominator = torch.matmul(q, state.normalizer[..., None])  # [B, G, R, 1]
    return numerator.view(batch, heads, 1, -1), denominator.view(batch, heads, 1, 1)


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan
) -> LinearOutput:
    """`S_t = S_{t-1} + φ(k_t) v_tᵀ`, `o_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t`, token by token."""
    features = plan.queries(query), plan.keys(key)
    outputs = []
    for t in range(query.shape[2]):
        q, k, v = (x[:, :, t : t + 1] for x in (*features, value))
        state = step(k, v, state)
        numerator, denominator = read(q, state)
        outputs.append((numerator / denominator.clamp(min=EPS)).to(query.dtype))
    return LinearOutput(torch.cat(outputs, dim=2), state)
