"""What answers count that get less likely, beside what documents lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .probes import Probe

ROUNDING = 1e-2  # nats that a loss may be off in half precision


class Weighing:
    """What choices lose, of divergence and recall.

    An answer of n tokens that each lose x nats is found less often by `1 - exp(-n x)`. So much counts, as nats of a
    token: `(1 - exp(-n x)) / n`, which is x as long as it is small. What is lost anyway takes nothing from what can be
    kept.

    Args:
        probes: Texts with answers.
        texts: How many of them are calibration texts, first: plans tell the recall of all of these together.
        weight: What a nat of an answer's token counts beside one of the documents.
    """

    def __init__(self, probes: Sequence[Probe], texts: int, weight: float) -> None:
        self.tokens = torch.tensor([probe.answer_tokens for probe in probes], dtype=torch.float64)
        self.texts, self.weight = texts, weight

    def lost(self, divergence: float, answers: torch.Tensor) -> tuple[float, float]:
        """Return what a choice loses, and what plans tell of it.

        Args:
            divergence: Of the calibration texts.
            answers: Nats that a token of an answer loses, of each text. Those that get likelier than they were do not
                make up for others.
        """
        told = float(answers[: self.texts].mean().clamp(min=0))
        lost = -torch.expm1(-self.tokens * answers.clamp(min=0)) / self.tokens
        return divergence + self.weight * float(lost.mean()), divergence + self.weight * told

    def gradients(self, slopes: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of the recall in both that `lost` returns.

        Args:
            slopes: The gradient of `answers`, of each text.
            answers: As for `lost`.
        """
        left = torch.exp(-self.tokens * answers.clamp(min=0)).to(slopes.dtype)
        told = self.gradient(slopes[: self.texts].mean(0, keepdim=True), answers[: self.texts].mean(0, keepdim=True))
        return self.gradient(slopes * left[:, None, None], answers), told

    def gradient(self, slopes: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Return the gradient of nats, whatever is left: of nothing where answers got likelier; where little is lost,
        or nothing, as it is."""
        return self.weight * (slopes * (answers > -ROUNDING)[:, None, None]).mean(0)
