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
from .measure import Past, read
from .probes import Probe


class Recall:
    """Answers to questions behind texts that were read.

    Args:
        model: A dense model.
        probes: Texts with answers.
        pasts: What was made of each; None to let the dense model read them.
    """

    def __init__(self, model: PreTrainedModel, probes: Sequence[Probe], pasts: Sequence[Past] | None = None) -> None:
        self.model, self.probes = model, probes
        self.pasts = pasts or [read(model, probe) for probe in tqdm(probes, desc="recall", unit="text")]

    def losses(self, gates: Gates, values: torch.Tensor) -> torch.Tensor:
        """Return the nats that an answer's token loses in each text, where layers attend as `values` say."""
        with torch.no_grad():
            gates.set(values)
            return torch.stack([self._loss(index) for index in range(len(self.probes))]).cpu()

    def gradients(self, gates: Gates, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `losses` does, and the gradient of each in the gates `[texts, units, candidates]`."""
        losses, slopes = [], []
        for index in range(len(self.probes)):
            with gates.at(values) as leaf:
                loss = self._loss(index)
            slopes.append(torch.autograd.grad(loss, leaf)[0])
            losses.append(loss.detach().cpu())
        return torch.stack(losses), torch.stack(slopes)

    def _loss(self, index: int) -> torch.Tensor:
        probe, past = self.probes[index], self.pasts[index]
        end, ids = probe.since(probe.start), probe.ids[None, probe.start : -1].to(self.model.device)
        logits = self.model(ids, **with_cache(self.model, copy.deepcopy(past.cache))).logits[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits[end.is_answer].to(wide), end.ids[1:][end.is_answer].to(logits.device))
