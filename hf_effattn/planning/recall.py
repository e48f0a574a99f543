"""What a model between several choices still finds of what was hidden far before, and where more would help."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..cache import with_cache
from .gates import Gates
from .measure import Past, inputs_of, read_batch
from .probes import Batch


class Recall:
    """Answers to questions behind texts that were read.

    Args:
        model: A dense model.
        batches: Texts with answers.
        pasts: What was made of each batch; None to let the dense model read them.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], pasts: Sequence[Past] | None = None) -> None:
        self.model, self.batches = model, batches
        self.pasts = pasts or [read_batch(model, batch) for batch in tqdm(batches, desc="recall", unit="batch")]

    def losses(self, gates: Gates, values: torch.Tensor) -> torch.Tensor:
        """Return the nats that an answer's token loses in each text, where layers attend as `values` say."""
        with torch.no_grad():
            gates.set(values)
            return torch.cat([self._losses(index) for index in range(len(self.batches))]).cpu()

    def gradients(self, gates: Gates, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `losses` does, and the gradient of each in the gates `[texts, units, candidates]`."""
        losses, slopes = [], []
        for index, batch in enumerate(self.batches):
            with gates.at(values.expand(len(batch), -1, -1)) as leaf:
                own = self._losses(index)
            slopes.append(torch.autograd.grad(own.sum(), leaf)[0])
            losses.append(own.detach().cpu())
        return torch.cat(losses), torch.cat(slopes)

    def _losses(self, index: int) -> torch.Tensor:
        """Return the loss of each text of a batch."""
        ends, past = [probe.since(probe.start) for probe in self.batches[index]], self.pasts[index]
        cache = with_cache(self.model, copy.deepcopy(past.cache))
        logits = self.model(inputs_of(self.model, ends), **cache).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        return torch.stack(
            [
                cross_entropy(own[end.is_answer].to(wide), end.ids[1:][end.is_answer].to(own.device))
                for own, end in zip(logits, ends, strict=True)
            ]
        )
