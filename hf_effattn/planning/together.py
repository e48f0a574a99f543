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
from .frank_wolfe import Found, frank_wolfe
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
    """
    names, weight = [candidate.name for candidate in candidates], found.recall_weight
    changed = [name for name in names if name != DENSE]
    costs, prices = (
        torch.tensor([[getattr(row, field)[name] for name in names] for row in found.layers], dtype=torch.float64)
        for field in ("costs", "prices")
    )
    recall = Recall(model, asked)
    way, expected = _between(model, units, candidates, found, costs, prices, texts, recall, rounds)
    others = list(zip(asked, recall.pasts, strict=True))[len(texts) :]
    whole = Whole(model, units, candidates, found.context_length, texts, others)
    del recall, others  # much memory
    seen_texts: dict[tuple[int, ...], float] = {}  # plans tell the recall of calibration texts

    def look(choice: tuple[int, ...]) -> tuple[float, Seen]:
        seen = whole.look(choice)
        seen_texts[choice] = seen.divergence + weight * float(seen.answers[: len(texts)].mean())
        return seen.divergence + weight * float(seen.answers.mean()), seen

    def gradient(choice: tuple[int, ...], seen: Seen) -> torch.Tensor:
        return whole.gradient(one_hot(torch.tensor(choice), len(names)).float(), seen, weight)

    limit = found.budget.limit - found.fixed_price
    better = refine(way.choice, costs, prices, limit, look, gradient, rounds)
    if better.choice != way.choice:
        expected = better.expected * seen_texts[better.before]
    costs += (way.gradient - way.gradient[:, names.index(DENSE), None]).clamp(min=0)
    layers = tuple(
        replace(row, choice=names[index], costs=dict(zip(names, own.tolist(), strict=True)))
        for row, index, own in zip(found.layers, better.choice, costs, strict=True)
    )
    new = replace(found, layers=layers)
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
) -> tuple[Found, float]:
    """Return a choice found between all others, and what it is expected to lose."""
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

        expected: dict[tuple[int, ...], float] = {}  # plans tell the recall of calibration texts

        def lost(values: torch.Tensor) -> float:
            """Return what a choice loses. That some answers get likelier than they were does not make up for others."""
            text, answers = spread(values), recall.losses(gates, values) - before
            own = float(answers[: len(texts)].mean().clamp(min=0))
            expected[tuple(values.argmax(1).tolist())] = text + weight * own
            return text + weight * float(answers.clamp(min=0).mean())

        limit = found.budget.limit - found.fixed_price
        way = frank_wolfe(
            costs, prices, limit, dense, lost, lambda x: weight * recall.gradient(gates, x, before), rounds
        )
        return way, expected[way.choice]
