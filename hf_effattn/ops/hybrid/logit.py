"""The logit of the linear past, which joins it to the softmax window under one normaliser."""

from __future__ import annotations

import torch
from torch.nn import functional

from .options import NOTHING


def is_relative(join: str) -> bool:
    """Whether the linear past is weighed relative to the largest score of the window, which its logit then lacks."""
    return join == "lolcats"


def linear_logit(denominator: torch.Tensor, bias: torch.Tensor, join: str) -> torch.Tensor:
    """Return the logit of the linear past beside the scores of the window, minus infinity where there is no past: as if
    all of the past were one more key, whose value is `o_lin`.

    - "log": `log(φ(q)·z) + b`. Both parts are masses on one scale: with `φ(q)·φ(k) = exp(q·k/√D)` and b = 0 this is
      softmax attention over everything.
    - "lolcats": numerator and denominator are `sigmoid(b) Σ exp(s − c) v + Σ φ(q)·φ(k) v` with c the largest score of
      the window (LoLCATs, Zhang 2024, arXiv 2410.10254); as a logit, `log(φ(q)·z) − log sigmoid(b) + c`, where callers
      add c.

    Args:
        denominator: `φ(q)·z` `[..., 1]`.
        bias: b, broadcastable to it.
        join: "log" or "lolcats".
    """
    logit = denominator.clamp(min=NOTHING).log() + (-functional.logsigmoid(bias) if is_relative(join) else bias)
    return logit.masked_fill(denominator <= NOTHING, -torch.inf)
