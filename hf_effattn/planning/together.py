"""The choice for all layers together: divergences, which add up, and recall, which does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .journal import Journal, fingerprint
from .measure import logits_of, loss_of
from .parts import Text, divergence
from .probes import Batch
from .recall import Recall
from .refine import refine
from .weighing import Weighing
from .whole import Whole

Known = Callable[[str, torch.Tensor, Callable[[], tuple[torch.Tensor, ...]]], tuple[torch.Tensor, ...]]


def choose_together(
    model: PreTrainedModel,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    found: Plan,
    texts: Sequence[Text],
    asked: Sequence[Batch],
    rounds: int,
    journal: Journal,
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
        asked: Texts with answers; first those of `texts`, one by one.
        rounds: Of either.
        journal: Of what choices, and gates between them, make of the texts.
        first: What is made better, if there is something already; it keeps the budget.
    """
    names, probes = [candidate.name for candidate in candidates], [probe for batch in asked for probe in batch]
    weighing = Weighing(probes, len(texts), found.recall_weight)
    changed = [name for name in names if name != DENSE]
    costs, prices = (
        torch.tensor([[getattr(row, field)[name] for name in names] for row in found.layers], dtype=torch.float64)
        for field in ("costs", "prices")
    )
    setting = fingerprint(*map(str, units), *names, *(probe.ids for probe in probes))

    def known(kind: str, at: torch.Tensor, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        return journal.tensors(f"{kind}, {setting}, {fingerprint(at)}", make)

    recall, expected = Recall(model, asked), None
    if first is None:
        first, expected = _between(
            model, units, candidates, found, costs, prices, texts, recall, weighing, rounds, known
        )
    others = list(zip(asked, recall.pasts, strict=True))[len(texts) :]
    whole = Whole(model, units, candidates, found.context_length, texts, others)
    del recall, others  # much memory

    def look(choice: tuple[int, ...]) -> tuple[float, float]:
        divergence, answers = known("look", torch.tensor(choice), lambda: whole.look(choice))
        return weighing.lost(float(divergence), answers)

    def gradient(choice: tuple[int, ...]) -> torch.Tensor:
        answers = known("look", torch.tensor(choice), lambda: whole.look(choice))[1]
        slope, slopes = known("gradient", torch.tensor(choice), lambda: whole.gradient(choice))
        return slope + torch.stack(weighing.gradients(slopes, answers))

    limit = found.budget.limit - found.fixed_price
    choice = tuple(names.index(row.choice) for row in first.layers)
    better = refine(choice, costs, prices, limit, look, gradient, rounds)
    if expected is None or better.choice != choice:
        expected = better.expected
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
    weighing: Weighing,
    rounds: int,
    known: Known,
) -> tuple[Plan, float]:
    """Return a plan found between all others, with what does not add up in its costs, and what it is to lose."""
    names = [candidate.name for candidate in candidates]
    everywhere = {
        name: one_hot(torch.full((len(units),), index), len(names)).float() for index, name in enumerate(names)
    }
    dense, changed = everywhere[DENSE], [name for name in names if name != DENSE]
    with gated(model, units, candidates, found.context_length) as gates:

        def answers(values: torch.Tensor) -> torch.Tensor:
            return known("answers", values, lambda: (recall.losses(gates, values),))[0]

        def moved(values: torch.Tensor) -> float:
            gates.set(values)
            return float(known("parts", values, lambda: (torch.tensor(divergence(model, texts)),))[0])

        def whole(values: torch.Tensor) -> float:
            gates.set(values)
            return float(known("whole", values, lambda: (torch.tensor(_of_whole(model, texts)),))[0])

        before = answers(dense)
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
            loss, told[tuple(values.argmax(1).tolist())] = weighing.lost(spread(values), answers(values) - before)
            return loss

        def slope(values: torch.Tensor) -> torch.Tensor:
            """Return the gradient of nats, not of what counts of them: that is all but flat where answers are lost."""
            losses, slopes = known("slopes", values, lambda: recall.gradients(gates, values))
            return weighing.gradient(slopes, losses - before)

        limit = found.budget.limit - found.fixed_price
        way = frank_wolfe(costs, prices, limit, dense, lost, slope, rounds)
        costs = costs + (way.gradient - way.gradient[:, names.index(DENSE), None]).clamp(min=0)
        layers = tuple(
            replace(row, choice=names[index], costs=dict(zip(names, own.tolist(), strict=True)))
            for row, index, own in zip(found.layers, way.choice, costs, strict=True)
        )
        return replace(found, layers=layers), told[way.choice]


def _of_whole(model: PreTrainedModel, texts: Sequence[Text]) -> float:
    """Return the divergence of the model as it is on whole texts, in nats a token."""
    found = [
        loss_of(logits_of(model, probe), probe.since(probe.first), past.logits).divergence for probe, past in texts
    ]
    return sum(found) / len(found)
