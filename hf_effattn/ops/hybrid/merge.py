"""Joining the softmax window and the linear past under one normaliser."""

from __future__ import annotations

import torch
from torch.nn import functional

from .options import NOTHING


def linear_logit(denominator: torch.Tensor, bias: torch.Tensor, scores: torch.Tensor, join: str) -> torch.Tensor:
    """Return the logit of the linear past beside the scores of the window, minus infinity where there is no past: as if
    all of the past were one more key, whose value is `o_lin`.

    - "log": `log(φ(q)·z) + b`. Both parts are masses on one scale: with `φ(q)·φ(k) = exp(q·k/√D)` and b = 0 this is
      softmax attention over everything.
    - "lolcats": numerator and denominator are `sigmoid(b) Σ exp(s − c) v + Σ φ(q)·φ(k) v` with c the largest score of
      the window (LoLCATs, Zhang 2024, arXiv 2410.10254); as a logit, `log(φ(q)·z) + c − log sigmoid(b)`.

    Args:
        denominator: `φ(q)·z` `[..., 1]`.
        bias: b, broadcastable to it.
        scores: Softmax scores of window and sinks `[..., S]`.
        join: "log" or "lolcats".
    """
    logit = denominator.clamp(min=NOTHING).log()
    if join == "log":
        logit = logit + bias
    else:  # of a copy, since callers write the logit beside the scores
        logit = logit + scores.clone().amax(dim=-1, keepdim=True) - functional.logsigmoid(bias)
    return logit.masked_fill(denominator <= NOTHING, -torch.inf)
