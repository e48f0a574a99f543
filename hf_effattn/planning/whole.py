"""What a choice makes of whole texts, and where more would help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..convert import revert_attention
from ..plans.heads import Unit
from .candidates import Candidate
from .gates import gated
from .measure import Past, assign, loss_of, read
from .parts import Text, divergence_gradient
from .probes import Probe
from .recall import Recall


class Seen(NamedTuple):
    """What a choice makes of whole texts.

    Args:
        divergence: Of the calibration texts, in nats a token.
        answers: Nats that a token of an answer loses more than in the dense model, of each text; those that got
            likelier lose nothing.
        pasts: Of each text, with the keys and values that the choice made of it.
    """

    divergence: float
    answers: torch.Tensor
    pasts: list[Past]


class Whole:
    """Whole texts that a model reads with a choice, and what changes there would do.

    Args:
        model: Dense, between calls.
        units: What candidates are chosen for.
        candidates: All can be gated.
        length: Of the texts, at most.
        texts: Calibration texts, with what the dense model made of each.
        others: Texts with nothing but answers, likewise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        candidates: Sequence[Candidate],
        length: int,
        texts: Sequence[Text],
        others: Sequence[Text],
    ) -> None:
        self.model, self.units, self.candidates, self.length = model, units, candidates, length
        self.texts, self.probes = texts, [probe for probe, _ in (*texts, *others)]
        self.dense = torch.tensor([_answers(probe, past) for probe, past in (*texts, *others)])

    def look(self, choice: Sequence[int]) -> Seen:
        """Return what a choice, an index of a candidate for each unit, makes of the texts."""
        assign(self.model, {unit: self.candidates[index] for unit, index in zip(self.units, choice, strict=True)})
        pasts = [read(self.model, probe) for probe in self.probes]
        revert_attention(self.model)
        found = [
            loss_of(own.logits, probe.since(probe.first), dense.logits).divergence
            for (probe, dense), own in zip(self.texts, pasts, strict=False)
        ]
        answers = torch.tensor([_answers(probe, past) for probe, past in zip(self.probes, pasts, strict=True)])
        pasts = [past._replace(logits=past.logits[:0]) for past in pasts]  # much memory
        return Seen(sum(found) / len(found), (answers - self.dense).clamp(min=0), pasts)

    def gradient(self, values: torch.Tensor, seen: Seen, recall_weight: float) -> torch.Tensor:
        """Return the gradient of the loss in gates at those of a choice, `[units, candidates]`; what is before parts of
        texts, and before questions, stays as the choice made it."""
        recall = Recall(self.model, self.probes, seen.pasts)
        with gated(self.model, self.units, self.candidates, self.length) as gates:
            slope = divergence_gradient(self.model, gates, values, self.texts, seen.pasts[: len(self.texts)])
            return slope + recall_weight * recall.gradient(gates, values, self.dense)


def _answers(probe: Probe, past: Past) -> float:
    return loss_of(past.logits, probe.since(probe.first), past.logits).recall
