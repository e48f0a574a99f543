"""What a choice makes of whole texts, and where more would help."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from ..convert import revert_attention
from ..plans import Loss
from ..plans.heads import Unit
from .candidates import Candidate
from .gates import gated
from .measure import Past, assign, loss_of, read_batch
from .parts import Text, divergence_gradient
from .probes import Batch
from .recall import Recall


class Whole:
    """Whole texts that a model reads with a choice, and what changes there would do.

    Args:
        model: Dense, between calls.
        units: What candidates are chosen for.
        candidates: All can be gated.
        length: Of the texts, at most.
        texts: Calibration texts, with what the dense model made of each.
        others: Batches of texts with nothing but answers, likewise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        candidates: Sequence[Candidate],
        length: int,
        texts: Sequence[Text],
        others: Sequence[tuple[Batch, Past]],
    ) -> None:
        self.model, self.units, self.candidates, self.length = model, units, candidates, length
        self.texts = texts
        self.batches: list[Batch] = [*([probe] for probe, _ in texts), *(batch for batch, _ in others)]
        self.logits = [*(past.logits[None] for _, past in texts), *(past.logits for _, past in others)]
        self.dense = torch.tensor(
            [loss.recall for index, own in enumerate(self.logits) for loss in self._losses(index, own)]
        )
        self._read: tuple[tuple[int, ...], list[Past]] | None = None

    def look(self, choice: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a choice, an index of a candidate for each unit, makes of the texts: the divergence of those for
        calibration in nats a token, and the nats that a token of an answer loses more than in the dense model, of each
        text."""
        assign(self.model, {unit: self.candidates[index] for unit, index in zip(self.units, choice, strict=True)})
        losses, pasts, self._read = [], [], None
        for index, batch in enumerate(self.batches):
            past = read_batch(self.model, batch)
            losses += self._losses(index, past.logits)
            pasts.append(past._replace(logits=past.logits[:0].clone()))  # much memory
        revert_attention(self.model)
        self._read = choice, pasts
        divergence = sum(loss.divergence for loss in losses[: len(self.texts)]) / len(self.texts)
        return torch.tensor(divergence), torch.tensor([loss.recall for loss in losses]) - self.dense

    def gradient(self, choice: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of both in gates, at those of a choice, `[units, candidates]` and `[texts, units,
        candidates]`; what is before parts of texts, and before questions, stays as the choice made it."""
        if self._read is None or self._read[0] != choice:
            self.look(choice)
        assert self._read is not None
        values, pasts = one_hot(torch.tensor(choice), len(self.candidates)).float(), self._read[1]
        recall = Recall(self.model, self.batches, pasts)
        with gated(self.model, self.units, self.candidates, self.length) as gates:
            slope = divergence_gradient(self.model, gates, values, self.texts, pasts[: len(self.texts)])
            return slope, recall.gradients(gates, values)[1]

    def _losses(self, index: int, logits: torch.Tensor) -> list[Loss]:
        """Return what each text of a batch loses."""
        own = zip(self.batches[index], logits, self.logits[index], strict=True)
        return [loss_of(found, probe.since(probe.first), dense) for probe, found, dense in own]
