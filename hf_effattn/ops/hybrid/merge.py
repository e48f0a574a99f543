"""Joining the softmax window and the linear past under one normaliser."""

from __future__ import annotations

import torch

NOTHING = 1e-30  # a linear denominator up to this means: no past, or none that resembles the query


def linear_logit(denominator: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `ℓ_lin = log(φ(q)·z) + b`, minus infinity where there is no past.

    Beside the scores of the window in one softmax it gives the linear past its share (after LoLCATs, arXiv 2410.10254,
    with both parts on one scale): as if all of the past were one more key, whose value is `o_lin`.

    Args:
        denominator: `φ(q)·z` `[..., 1]`; bias: b, broadcastable to it.
    """
    logit = denominator.clamp(min=NOTHING).log() + bias
    return logit.masked_fill(denominator <= NOTHING, -torch.inf)


def linear_value(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Return `o_lin`, the output of the linear part by itself: numerator `[..., V]` over denominator `[..., 1]`."""
    return numerator / denominator.clamp(min=NOTHING)
