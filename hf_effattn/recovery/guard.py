"""Noticing that a training diverges."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Hashable
from pathlib import Path

import torch

from .sharding import whole

RECENT = 50  # steps whose losses say what is usual


class Diverged(RuntimeError):
    """A training went wrong: says at which step, in which layer, and from where to go on."""


class Guard:
    """Stops a training whose loss is no number, or explodes.

    Args:
        factor: A loss this many times the median of the last 50 of its kind is too large.
        patience: Too large losses in a row that are put up with.
    """

    def __init__(self, factor: float = 5.0, patience: int = 3) -> None:
        self.factor, self.patience = factor, patience
        self.losses: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.strikes: Counter[Hashable] = Counter()

    def check(
        self,
        step: int,
        loss: float,
        model: torch.nn.Module,
        checkpoint: str | Path | None = None,
        kind: Hashable = None,
    ) -> None:
        """Take note of the loss of a step.

        Args:
            checkpoint: The last good one, for the message.
            kind: What steps must have in common for their losses to be compared, such as the width of a window.

        Raises:
            Diverged: if the loss is NaN or infinite, or has been too large for longer than `patience`.
        """
        last = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: the loss is {loss}; {_first_bad(model)}; {last}")
        losses = self.losses[kind]
        usual = sorted(losses)[len(losses) // 2] if losses else math.inf
        self.strikes[kind] = self.strikes[kind] + 1 if loss > self.factor * usual else 0
        if self.strikes[kind] > self.patience:
            raise Diverged(
                f"step {step}: the loss has been above {self.factor:g} times its median of {usual:.4g} for "
                f"{self.strikes[kind]} steps, now {loss:.4g}; {_first_bad(model)}; {last}"
            )
        if not self.strikes[kind]:
            losses.append(loss)


def _first_bad(model: torch.nn.Module) -> str:
    """Name the first trained parameter that is not finite, or has no finite gradient; else the largest gradient."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for kind, tensors in (
        ("parameter", [(name, whole(p.detach())) for name, p in trained]),
        ("gradient", [(name, whole(p.grad)) for name, p in trained if p.grad is not None]),
    ):
        for name, tensor in tensors:
            if not bool(tensor.isfinite().all()):
                return f"the first {kind} that is not finite is {name}"
    norms = {name: float(whole(p.grad).float().norm()) for name, p in trained if p.grad is not None}
    if not norms:
        return "all trained parameters are finite"
    largest = max(norms, key=norms.__getitem__)
    return f"all trained parameters are finite, the largest gradient ({norms[largest]:.3g}) is that of {largest}"
