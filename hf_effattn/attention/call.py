"""How one call of a mechanism is to be computed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """How one call of a mechanism is to be computed.

    Args:
        scale: Factor of the softmax scores.
        lengths: Real tokens of each row `[B]`, which come first; None for all.
        dropout: Probability with which softmax weights are dropped.
        in_place: Whether the given state may be overwritten.
        may_fill: Whether slots that it does not use may be, which a state that came of it before may have filled.
        keep_state: Whether the state after the call will be used; without, it may be any state.
    """

    scale: float
    lengths: torch.Tensor | None = None
    dropout: float = 0.0
    in_place: bool = False
    may_fill: bool = False
    keep_state: bool = True
