"""Joining the softmax window and the linear past under one normaliser, in log space."""

from __future__ import annotations

import torch

NOTHING = 1e-30  # a linear denominator below this means: no past, or none that resembles the query


def merge(
    softmax_numerator: torch.Tensor,
    softmax_denominator: torch.Tensor,
    softmax_max: torch.Tensor,
    linear_numerator: torch.Tensor,
    linear_denominator: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Compute `o = (e^{m}·n_sm + e^{b}·n_lin) / (e^{m}·d_sm + e^{b}·d_lin)`.

    That is `(e^{ℓ_sm} o_sm + e^{ℓ_lin} o_lin) / (e^{ℓ_sm} + e^{ℓ_lin})` with `ℓ_sm = LSE(q·k/√D)` over the window and
    `ℓ_lin = log(φ(q)·z) + b` (after LoLCATs, arXiv 2410.10254, with both parts on one scale). A common factor keeps
    the exponentials in range; it cancels, so it takes no part in the gradient.

    Args:
        softmax_numerator: `Σ e^{s−m} v` `[..., V]`, float32; softmax_denominator: `Σ e^{s−m}` `[..., 1]`.
        softmax_max: m, the largest score `[..., 1]`.
        linear_numerator: `φ(q)ᵀ Σ φ(k) vᵀ` `[..., V]`; linear_denominator: `φ(q)ᵀ Σ φ(k)` `[..., 1]`.
        bias: b, broadcastable to `[..., 1]`: how much the linear part weighs.
    """
    with torch.no_grad():
        empty = linear_denominator <= NOTHING
        log_linear = (linear_denominator.clamp(min=NOTHING).log() + bias).masked_fill(empty, -torch.inf)
        shift = torch.maximum(softmax_max, log_linear)
    softmax_weight = (softmax_max - shift).exp()
    linear_weight = (bias - shift).masked_fill(empty, -torch.inf).exp()
    numerator = softmax_numerator * softmax_weight + linear_numerator * linear_weight
    denominator = softmax_denominator * softmax_weight + linear_denominator * linear_weight
    return numerator / denominator
