"""The search for a plan."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import head_counts
from ..config import MechanismConfig, SparseConfig
from ..convert import revert_attention
from ..evaluation.variants import is_converted
from ..notation import whole_number
from ..plans import DENSE, PLAN, Budget, Loss, Plan
from ..plans.heads import Unit
from ..plans.scale import ratios
from ..targets import choose_layers, find_targets
from .candidates import Candidate, check_for_heads, default_candidates, read_candidates
from .costs import Chance
from .journal import Journal, identity_of
from .measure import Choice, Past, assign, logits_of, loss_of, read, single_changes, takes_over
from .prices import priced
from .probes import Probe, make_probes
from .speed import step_seconds

logger = logging.getLogger(__name__)


def plan(
    model: PreTrainedModel,
    documents: str | Path | Sequence[str],
    budget: str | int | Budget = "25%",
    context_length: int = 8192,
    candidates: Sequence[str | MechanismConfig] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    number: int = 2,
    recall_weight: float = 0.1,
    rounds: int = 1,
    by_head: bool = False,
    measured: int = 512,
    out: str | Path | None = None,
    seed: int = 42,
) -> Plan:
    """Choose the attention of each layer so that a budget is kept and as little as possible is lost.

    Each layer of the dense model by itself is changed to each candidate, and it is measured how far predictions of
    documents then are from those of the dense model (KL divergence), and what the answers to questions about things
    hidden far before lose, so that a plan does not buy perplexity with recall: on the end of calibration texts, before
    which all is as the dense model read it. The least sum within the budget is the plan, if losses add up; so it is
    measured as a whole, and with more rounds the changes again around it, while that makes it better. The cache and the
    logits of the dense model on the calibration texts are kept in memory.

    Args:
        model: A dense model of a supported family; afterwards it is as before.
        documents: A file, folder, dataset or list of texts, some as long as the context.
        budget: "25%" of the dense cache, bytes as a number or as in "40MB" (one row of a batch at the context length),
            or a speed of decoding behind so many tokens, as in "30 tokens/s", on this machine and the model's device.
        context_length: Tokens of a calibration text.
        candidates: "dense", "sparse:window=512,num_sinks=4", configs, …; None for dense attention and windows of a
            32nd, an eighth and a quarter of the context with 4 sinks.
        tokenizer: Of the model; None to load the one that belongs to it.
        number: Calibration texts.
        recall_weight: What a nat of an answer's token counts beside one of the documents.
        rounds: How often all changes are measured: in the dense model, then around the plan, where layers that stand in
            for each other each seem to gain what they gain together only once.
        by_head: Choose for each key/value head, not for each layer; candidates are then windows, with or without sinks.
        measured: Tokens at the end of each text, before the questions, on which single changes are measured.
        out: Folder for measurements; a run that was killed goes on from it.
        seed: Of what is hidden.

    Returns:
        The plan, for `convert_attention`.

    Raises:
        TypeError, ValueError: for a converted model, documents that are too short or too few, budgets that cannot be
            kept, and unknown candidates.
    """
    whole_number("context_length", context_length, 2)
    whole_number("number", number, 1)
    whole_number("rounds", rounds, 1)
    whole_number("measured", measured, 1)
    targets = find_targets(model)
    if is_converted(model):
        raise ValueError("the model is converted already; revert_attention first")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context_length > longest:
        raise ValueError(f"context_length={context_length} is more than the {longest} positions of the model")
    found = read_candidates(default_candidates(context_length) if candidates is None else candidates)
    units = [Unit(index) for index in choose_layers(targets, None, None)]
    if by_head:
        check_for_heads(found)
        counts = {unit.layer: head_counts(targets.modules[unit.layer], model.config)[1] for unit in units}
        units = [Unit(layer, head) for layer, number in counts.items() for head in range(number)]
    probes = make_probes(documents, tokenizer or _tokenizer(model), context_length, number, seed, measured)
    journal = Journal() if out is None else Journal(Path(out), identity_of(model, probes))
    was_training = model.training
    model.eval()
    try:
        return _Search(model, units, found, probes, journal).run(budget, rounds, recall_weight)
    finally:
        revert_attention(model)
        model.train(was_training)


class _Search:
    """A model, its candidates and what was measured of them.

    Args:
        units: What candidates are chosen for.
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
        self._chance = Chance({}, 0.0)
        self._pasts: dict[int, Past] = {}
        self._take_over = all(self._takes_over(name) for name in self.candidates)

    def run(self, wanted: str | int | Budget, rounds: int, recall_weight: float) -> Plan:
        length = len(self.probes[0].ids) - 1
        empty = priced(self.model, self.units, self.candidates, length, wanted, self._seconds, recall_weight)
        empty.for_budget(empty.budget)  # one that cannot be kept is told before hours of measuring
        measured = {name: self.losses(self.everywhere(name), name) for name in self.candidates}
        empty = replace(empty, measured=measured)
        base, start = self.dense, empty.total(DENSE)
        best: Plan | None = None
        for number in range(1, rounds + 1):
            around = replace(self.around(base, empty, f"round {number}"), start=start)
            if best is None:
                names = [name for name in self.candidates if name != DENSE]
                known = ratios(map(around.sum_of, names), [empty.total(name) - start for name in names])
            else:
                known = ratios([best.sum], [best.total(PLAN) - best.start]) or best.ratios
            new = replace(around, ratios=known).for_budget(empty.budget)
            choice = self.choice(new)
            new = replace(new, measured=measured | {PLAN: self.losses(choice, PLAN)})
            logger.info("round %d: predicted %.5f, measured %.5f", number, new.predicted, new.total(PLAN))
            if best is not None and new.total(PLAN) >= best.total(PLAN):
                break
            best = new
            if choice == base:
                break
            base, start = choice, new.total(PLAN)
        assert best is not None
        return best

    def everywhere(self, name: str) -> Choice:
        return dict.fromkeys(self.units, self.candidates[name])

    def _takes_over(self, name: str) -> bool:
        assign(self.model, self.everywhere(name))
        return takes_over(self.model)

    def choice(self, found: Plan) -> Choice:
        return {unit: self.candidates[row.choice] for unit, row in zip(self.units, found.layers, strict=True)}

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

    def past(self, number: int) -> Past:
        """Return what the dense model makes of a calibration text, which is kept in memory."""
        if number not in self._pasts:
            revert_attention(self.model)
            self._pasts[number] = read(self.model, self.probes[number], self._take_over)
        return self._pasts[number]

    def around(self, base: Choice, empty: Plan, name: str) -> Plan:
        """Return a plan with the costs of single changes of `base`."""
        firsts = list({unit.layer: unit for unit in reversed(self.units)}.values()) if base == self.dense else []
        every_key = Candidate("every key", SparseConfig(pattern="sliding_window", window=empty.context_length))
        unchanged, controls = (self.units[0], base[self.units[0]]), [(unit, every_key) for unit in firsts]
        pairs = [(u, c) for u in self.units for c in self.candidates.values() if c != base[u]]
        losses = self._changes(base, [unchanged, *controls, *pairs], name)
        start = losses[unchanged]
        if controls:
            self._chance = Chance.of(start, {pair[0]: losses[pair] for pair in controls})
        chance = self._chance if controls else self._chance._replace(divergences={})
        layers = []
        for unit, row in zip(self.units, empty.layers, strict=True):
            found = {c.name: losses.get((unit, c), start) for c in self.candidates.values()}
            costs = {each: chance.cost(unit.layer, x, start, empty.recall_weight) for each, x in found.items()}
            # That a few answers are likelier if a layer forgets is chance, too, and would add up to much.
            least = min(costs[DENSE], 0.0)
            costs = {each: max(cost, least) for each, cost in costs.items()}
            layers.append(replace(row, choice=base[unit].name, costs=costs))
        return replace(empty, layers=tuple(layers))

    def _changes(
        self, base: Choice, pairs: list[tuple[Unit, Candidate]], name: str
    ) -> dict[tuple[Unit, Candidate], Loss]:
        """Return the mean losses of single changes of `base` on the ends of the calibration texts."""
        before = _short(base)
        keys = {(unit, c): f"{unit} {c.name}, else {before}" for unit, c in pairs}
        with tqdm(total=len(pairs) * len(self.probes), desc=name, unit="change") as bar:
            for number, probe in enumerate(self.probes):
                missing = [pair for pair in pairs if f"end {number}, {keys[pair]}" not in self.journal]
                bar.update(len(pairs) - len(missing))
                if missing:
                    for unit, candidate, loss in single_changes(self.model, probe, self.past(number), base, missing):
                        self.journal.add(f"end {number}, {keys[unit, candidate]}", loss)
                        bar.update()
        numbers = range(len(self.probes))
        return {pair: self._mean([f"end {number}, {key}" for number in numbers]) for pair, key in keys.items()}

    def _seconds(self, name: str) -> float:
        key = f"seconds {name}"
        if key not in self.journal:
            assign(self.model, self.everywhere(name))
            self.journal.add(key, step_seconds(self.model, self.probes[0].ids[:-1]))
        return float(self.journal.known[key])

    def _mean(self, keys: Sequence[str]) -> Loss:
        losses = torch.tensor([self.journal.loss(key) for key in keys], dtype=torch.float64)
        return Loss(*losses.nanmean(dim=0).tolist())


def _short(choice: Choice) -> str:
    """Return a name for a choice: that of its candidate if there is one in all layers."""
    names = [candidate.name for candidate in choice.values()]
    return names[0] if len(set(names)) == 1 else hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _tokenizer(model: PreTrainedModel) -> Any:
    name = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"found no tokenizer in {name!r}; give tokenizer=") from error
