"""What is measured of a model and its candidates, each thing once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import SparseConfig
from ..convert import revert_attention
from ..plans import DENSE, Loss, Plan
from ..plans.heads import Unit
from .candidates import Candidate
from .costs import Chance
from .journal import Journal, fingerprint
from .measure import Choice, Past, assign, logits_of, loss_of, read, single_changes, takes_over
from .probes import Probe
from .speed import step_seconds


class Measurements:
    """A model, its candidates and what was measured of them.

    Args:
        units: What candidates are chosen for.
        probes: Calibration texts.
        journal: Of all measurements; those it has are not made again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: list[Unit],
        candidates: list[Candidate],
        probes: list[Probe],
        journal: Journal,
    ) -> None:
        self.model, self.units, self.probes, self.journal = model, units, probes, journal
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self.dense = self.everywhere(DENSE)
        self._pasts: dict[int, Past] = {}
        self._take_over = all(self._takes_over(name) for name in self.candidates)

    def everywhere(self, name: str) -> Choice:
        """Return the choice of one candidate for all units."""
        return dict.fromkeys(self.units, self.candidates[name])

    def choice(self, found: Plan) -> Choice:
        """Return what a plan chooses."""
        return {unit: self.candidates[row.choice] for unit, row in zip(self.units, found.layers, strict=True)}

    @property
    def has_pasts(self) -> bool:
        """Whether all candidates can go on from what the dense model made of a text."""
        return self._take_over and self.past(0).cache is not None

    def past(self, number: int) -> Past:
        """Return what the dense model makes of a calibration text, which is kept in memory."""
        if number not in self._pasts:
            revert_attention(self.model)
            self._pasts[number] = read(self.model, self.probes[number], self._take_over)
        return self._pasts[number]

    def losses(self, choice: Choice, name: str) -> Loss:
        """Return the mean losses of a model with this choice."""
        keys = [f"text {number}, {_short(choice)}" for number in range(len(self.probes))]
        missing = [number for number, key in enumerate(keys) if key not in self.journal]
        for number in tqdm(missing, desc=name, unit="text", disable=not missing):
            own = dense = self.past(number).logits
            if name != DENSE:
                assign(self.model, choice)
                own = logits_of(self.model, self.probes[number])
            probe = self.probes[number]
            self.journal.add(keys[number], loss_of(own, probe.since(probe.first), dense))
        return self._mean(keys)

    def single(self, empty: Plan, recall_weight: float) -> Plan:
        """Return a plan with the costs of single changes; nothing is asked where recall has no weight."""
        firsts = list({unit.layer: unit for unit in reversed(self.units)}.values())
        every_key = Candidate("every key", SparseConfig(pattern="sliding_window", window=empty.context_length))
        unchanged, controls = (self.units[0], self.candidates[DENSE]), [(unit, every_key) for unit in firsts]
        pairs = [(unit, c) for unit in self.units for c in self.candidates.values() if c.name != DENSE]
        losses = self._changes([unchanged, *controls, *pairs], recall_weight > 0)
        start = losses[unchanged]
        chance = Chance.of(start, {pair[0]: losses[pair] for pair in controls})
        layers = []
        for unit, row in zip(self.units, empty.layers, strict=True):
            found = {c.name: losses.get((unit, c), start) for c in self.candidates.values()}
            costs = {each: chance.cost(unit.layer, x, start, recall_weight) for each, x in found.items()}
            # That a few answers are likelier if a layer forgets is chance, too, and would add up to much.
            layers.append(replace(row, costs={each: max(cost, 0.0) for each, cost in costs.items()}))
        return replace(empty, layers=tuple(layers))

    def seconds(self, name: str) -> float:
        """Return the time of a decoding step with a candidate in all layers."""
        key = f"seconds {name}"
        if key not in self.journal:
            assign(self.model, self.everywhere(name))
            self.journal.add(key, step_seconds(self.model, self.probes[0].ids[:-1]))
        return float(self.journal.known[key])

    def _takes_over(self, name: str) -> bool:
        assign(self.model, self.everywhere(name))
        return takes_over(self.model)

    def _changes(self, pairs: list[tuple[Unit, Candidate]], asks: bool) -> dict[tuple[Unit, Candidate], Loss]:
        """Return the mean losses of single changes of the dense model on the ends of the calibration texts, or, if
        nothing is to be asked, of their documents."""
        end = "end" if asks else "end of document"
        keys = {(unit, c): f"{unit} {c.name}" for unit, c in pairs}
        with tqdm(total=len(pairs) * len(self.probes), desc="single changes", unit="change") as bar:
            for number, whole in enumerate(self.probes):
                missing = [pair for pair in pairs if f"{end} {number}, {keys[pair]}" not in self.journal]
                bar.update(len(pairs) - len(missing))
                if missing:
                    probe = whole if asks else whole.document
                    found = single_changes(self.model, probe, self.past(number), self.dense, missing)
                    for unit, candidate, loss in found:
                        self.journal.add(f"{end} {number}, {keys[unit, candidate]}", loss)
                        bar.update()
        numbers = range(len(self.probes))
        return {pair: self._mean([f"{end} {number}, {key}" for number in numbers]) for pair, key in keys.items()}

    def _mean(self, keys: Sequence[str]) -> Loss:
        losses = torch.tensor([self.journal.loss(key) for key in keys], dtype=torch.float64)
        return Loss(*losses.nanmean(dim=0).tolist())


def _short(choice: Choice) -> str:
    """Return a name for a choice: that of its candidate if there is one in all layers."""
    names = [candidate.name for candidate in choice.values()]
    return names[0] if len(set(names)) == 1 else fingerprint(*names)
