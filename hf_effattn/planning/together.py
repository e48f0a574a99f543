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
from .measure import logits_of, loss_of
from .parts import Text, divergence
from .probes import Probe
from .recall import Recall
from .refine import refine
from .whole import Seen, Whole


def choose_together(
    model: PreTrainedModel,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    found: Plan,
    texts: Sequence[Text],
    asked: Sequence[Probe],
    rounds: int,
    first: Plan | None = None,
) -> Plan:
    """Return a plan of little divergence and recall within the budget: the best of choices that are looked at behind
    what the dense model made of texts (`frank_wolfe`), made better where each reads whole texts by itself (`refine`).

    Args:
        model: Dense.
        units: What candidates are chosen for.
        candidates: Those of `found`, in its order; all can be gated.
        found: A plan whose costs are divergences of single changes.
        texts: Calibration texts, with what the dense model made of each.
        asked: Texts with answers; first those of `texts`.
        rounds: Of either.
        first: What is made better, if there is something already; it keeps the budget.
    """
    names, weight = [candidate.name for candidate in candidates], found.recall_weight
    changed = [name for name in names if name != DENSE]
    costs, prices = (
        torch.tensor([[getattr(row, field)[name] for name in names] for row in found.layers], dtype=torch.float64)
        for field in ("costs", "prices")
    )
    recall, expected = Recall(model, asked), None
    if first is None:
        first, expected = _between(model, units, candidates, found, costs, prices, texts, recall, rounds)
    others = list(zip(asked, recall.pasts, strict=True))[len(texts) :]
    whole = Whole(model, units, candidates, found.context_length, texts, others)
    del recall, others  # much memory
    told: dict[tuple[int, ...], float] = {}

    def look(choice: tuple[int, ...]) -> tuple[float, Seen]:
        seen = whole.look(choice)
        loss, told[choice] = _weighed(seen.divergence, seen.answers, len(texts), weight)
        return loss, seen

    def gradient(choice: tuple[int, ...], seen: Seen) -> torch.Tensor:
        return whole.gradient(one_hot(torch.tensor(choice), len(names)).float(), seen, weight)

    limit = found.budget.limit - found.fixed_price
    choice = tuple(names.index(row.choice) for row in first.layers)
    better = refine(choice, costs, prices, limit, look, gradient, rounds)
    if expected is None or better.choice != choice:
        expected = better.expected * told[better.before]
    layers = (replace(row, choice=names[index]) for row, index in zip(first.layers, better.choice, strict=True))
    new = replace(found, layers=tuple(layers))
    sums, losses = [*map(new.sum_of, changed), new.sum], [new.total(name) - new.start for name in changed]
    return replace(new, ratios=ratios(sums, [*losses, expected]))


def _between(
    model: PreTrainedModel,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    found: Plan,
    costs: torch.Tensor,
    prices: torch.Tensor,
    texts: Sequence[Text],
    recall: Recall,
    rounds: int,
) -> tuple[Plan, float]:
    """Return a plan found between all others, with what does not add up in its costs, and what it is to lose."""
    names, weight = [candidate.name for candidate in candidates], found.recall_weight
    everywhere = {
        name: one_hot(torch.full((len(units),), index), len(names)).float() for index, name in enumerate(names)
    }
    dense, changed = everywhere[DENSE], [name for name in names if name != DENSE]
    with gated(model, units, candidates, found.context_length) as gates:
        before = recall.losses(gates, dense)

        def moved(values: torch.Tensor) -> float:
            gates.set(values)
            return divergence(model, texts)

        def whole(values: torch.Tensor) -> float:
            gates.set(values)
            divergences = [
                loss_of(logits_of(model, probe), probe.since(probe.first), past.logits).divergence
                for probe, past in texts
            ]
            return sum(divergences) / len(divergences)

        pairs = [(moved(everywhere[name]), found.measured[name].divergence) for name in changed]

        def spread(values: torch.Tensor) -> float:
            """Return the divergence that a choice is to have: that of parts of the texts, as whole texts have more in
            uniform choices and in the first mixed one, which is read whole."""
            parts = moved(values)
            if len(pairs) == len(changed):
                pairs.append((parts, whole(values)))
            return parts * ratio_at(ratios(*zip(*pairs, strict=True)), parts)

        told: dict[tuple[int, ...], float] = {}

        def lost(values: torch.Tensor) -> float:
            answers = recall.losses(gates, values) - before
            loss, told[tuple(values.argmax(1).tolist())] = _weighed(spread(values), answers, len(texts), weight)
            return loss

        limit = found.budget.limit - found.fixed_price
        way = frank_wolfe(
            costs, prices, limit, dense, lost, lambda x: weight * recall.gradient(gates, x, before), rounds
        )
        costs = costs + (way.gradient - way.gradient[:, names.index(DENSE), None]).clamp(min=0)
        layers = tuple(
            replace(row, choice=names[index], costs=dict(zip(names, own.tolist(), strict=True)))
            for row, index, own in zip(found.layers, way.choice, costs, strict=True)
        )
        return replace(found, layers=layers), told[way.choice]


def _weighed(divergence: float, answers: torch.Tensor, texts: int, weight: float) -> tuple[float, float]:
    """Return what a choice loses, and how much of that plans tell.

    Args:
        divergence: Of the calibration texts.
        answers: Nats that answers lose, of each text. Those that get likelier than they were do not make up for others.
        texts: How many of these are calibration texts, first: plans tell the recall of all of them together.
        weight: Of recall.
    """
    own = float(answers[:texts].mean().clamp(min=0))
    return divergence + weight * float(answers.clamp(min=0).mean()), divergence + weight * own
