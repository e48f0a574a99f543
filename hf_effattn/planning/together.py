"""The choice for all layers together: divergences, which add up, and recall, which does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from ..plans import DENSE, Plan
from ..plans.heads import Unit
from ..plans.scale import ratio_at, ratios
from .candidates import Candidate
from .frank_wolfe import frank_wolfe
from .gates import Gates, gated
from .measure import Past, end_logits, loss_of
from .probes import Probe
from .recall import Recall


class Ends:
    """How far the ends of calibration texts, behind what the dense model read, are from what it makes of them.

    Args:
        model: Dense, with gates.
        gates: Its gates.
        texts: With what the dense model made of each.
        dense: Gates with which all is dense: in 16 bits even these move predictions, by rounding.
        known: Of candidates in all layers, gates and what was measured of them on whole texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Gates,
        texts: Sequence[tuple[Probe, Past]],
        dense: torch.Tensor,
        known: Sequence[tuple[torch.Tensor, float]],
    ) -> None:
        self.model, self.gates, self.texts, self.chance = model, gates, texts, 0.0
        self.chance = self.divergence(dense)
        self.ratios = ratios([self.divergence(values) for values, _ in known], [whole for _, whole in known])

    def divergence(self, values: torch.Tensor) -> float:
        """Return the divergence of ends, in nats a token."""
        self.gates.set(values)
        found = []
        for probe, past in self.texts:
            dense = past.logits[probe.start - probe.first :]
            found.append(loss_of(end_logits(self.model, probe, past), probe.since(probe.start), dense).divergence)
        return max(sum(found) / len(found) - self.chance, 0.0)

    def predicted(self, values: torch.Tensor) -> float:
        """Return the divergence of whole texts that is to be expected."""
        found = self.divergence(values)
        return found * ratio_at(self.ratios, found)


def choose_together(
    model: PreTrainedModel,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    found: Plan,
    texts: Sequence[tuple[Probe, Past]],
    asked: Sequence[Probe],
    rounds: int,
) -> Plan:
    """Return the plan of least divergence and recall within the budget.

    Args:
        model: Dense.
        units: What candidates are chosen for.
        candidates: Those of `found`, in its order; all can be gated.
        found: A plan whose costs are divergences of single changes.
        texts: Calibration texts, with what the dense model made of each.
        asked: Texts with answers; first those of `texts`.
        rounds: Of `frank_wolfe`.
    """
    names, weight = [candidate.name for candidate in candidates], found.recall_weight
    costs, prices = (
        torch.tensor([[getattr(row, field)[name] for name in names] for row in found.layers], dtype=torch.float64)
        for field in ("costs", "prices")
    )
    everywhere = {
        name: one_hot(torch.full((len(units),), index), len(names)).float() for index, name in enumerate(names)
    }
    changed = [name for name in names if name != DENSE]
    recall = Recall(model, asked)
    with gated(model, units, candidates, found.context_length) as gates:
        known = [(everywhere[name], found.measured[name].divergence) for name in changed]
        ends = Ends(model, gates, texts, everywhere[DENSE], known)
        before = recall.losses(gates, everywhere[DENSE])
        way = frank_wolfe(
            costs,
            prices,
            found.budget.limit - found.fixed_price,
            everywhere[DENSE],
            lambda x: ends.predicted(x) + weight * float((recall.losses(gates, x) - before).mean()),
            lambda x: weight * recall.gradient(gates, x),
            rounds,
        )
        chosen = one_hot(torch.tensor(way.choice), len(names)).float()
        answers = (recall.losses(gates, chosen) - before)[: len(texts)]  # plans tell the recall of calibration texts
        lost = ends.predicted(chosen) + weight * float(answers.mean())
    costs += (way.gradient - way.gradient[:, names.index(DENSE), None]).clamp(min=0)
    layers = tuple(
        replace(row, choice=names[index], costs=dict(zip(names, own.tolist(), strict=True)))
        for row, index, own in zip(found.layers, way.choice, costs, strict=True)
    )
    new = replace(found, layers=layers)
    sums, losses = [*map(new.sum_of, changed), new.sum], [new.total(name) - new.start for name in changed]
    return replace(new, ratios=ratios(sums, [*losses, lost]))
