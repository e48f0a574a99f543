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
from .gates import gated
from .probes import Probe
from .recall import Recall


def choose_together(
    model: PreTrainedModel,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    found: Plan,
    asked: Sequence[Probe],
    num_texts: int,
    rounds: int,
) -> Plan:
    """Return the plan of least divergence and recall within the budget.

    Args:
        model: Dense.
        units: What candidates are chosen for.
        candidates: Those of `found`, in its order; all can be gated.
        found: A plan whose costs are divergences of single changes, unscaled.
        asked: Texts with answers.
        num_texts: How many of them, the first, are the calibration texts: plans tell the recall of these.
        rounds: Of `frank_wolfe`.
    """
    names, weight = [candidate.name for candidate in candidates], found.recall_weight
    costs, prices = (
        torch.tensor([[getattr(row, field)[name] for name in names] for row in found.layers], dtype=torch.float64)
        for field in ("costs", "prices")
    )
    changed = [name for name in names if name != DENSE]
    scales = ratios(map(found.sum_of, changed), [found.measured[name].divergence for name in changed])
    costs *= ratio_at(scales, found.for_budget(found.budget).sum)
    dense = one_hot(torch.full((len(units),), names.index(DENSE)), len(names)).float()
    recall = Recall(model, asked)
    with gated(model, units, candidates, found.context_length) as gates:
        way = frank_wolfe(
            costs,
            prices,
            found.budget.limit - found.fixed_price,
            dense,
            lambda values: weight * float(recall.losses(gates, values).mean()),
            lambda values: weight * recall.gradient(gates, values),
            rounds,
        )
        chosen = one_hot(torch.tensor(way.choice), len(names)).float()
        before, after = (float(recall.losses(gates, x)[:num_texts].mean()) for x in (dense, chosen))
    lost = float((costs * chosen).sum()) + weight * (after - before)
    costs += (way.gradient - way.gradient[:, names.index(DENSE), None]).clamp(min=0)
    layers = tuple(
        replace(row, choice=names[index], costs=dict(zip(names, own.tolist(), strict=True)))
        for row, index, own in zip(found.layers, way.choice, costs, strict=True)
    )
    new = replace(found, layers=layers)
    sums, losses = [*map(new.sum_of, changed), new.sum], [new.total(name) - new.start for name in changed]
    return replace(new, ratios=ratios(sums, [*losses, lost]))
