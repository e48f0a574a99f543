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
from .gates import can_be_gated
from .journal import Journal, identity_of
from .measure import Choice, Past, assign, logits_of, loss_of, read, single_changes, takes_over
from .prices import priced
from .probes import Probe, make_asked, make_probes
from .speed import step_seconds
from .together import choose_together

logger = logging.getLogger(__name__)

RECALL_WEIGHT, ROUNDS = 0.1, 5


def plan(
    model: PreTrainedModel,
    documents: str | Path | Sequence[str],
    budget: str | int | Budget = "25%",
    context_length: int = 8192,
    candidates: Sequence[str | MechanismConfig] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    number: int = 2,
    recall_weight: float = RECALL_WEIGHT,
    rounds: int = ROUNDS,
    by_head: bool = False,
    measured: int = 512,
    out: str | Path | None = None,
    seed: int = 42,
) -> Plan:
    """Choose the attention of each layer so that a budget is kept and as little as possible is lost.

    Each layer of the dense model by itself is changed to each candidate, and it is measured how far predictions of
    documents then are from those of the dense model (KL divergence): on the end of calibration texts, before which all
    is as the dense model read it. These losses add up. Recall does not: layers stand in for each other until too many
    are changed. So that a plan does not buy perplexity with it, answers to questions about things hidden far before are
    looked at between choices, where they have a gradient (see `frank_wolfe`). What is found is made better by steps in
    which whole texts are read and a few choices differ (see `refine`), and measured as a whole. The caches of all these
    texts are kept in memory.

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
        recall_weight: What a nat of an answer's token counts beside one of the documents; less for budgets that cannot
            keep recall anyway.
        rounds: Of the search, and steps to better choices. With candidates other than patterns and linear attention as
            they come (selectors, mechanisms that read more than queries and keys), there are none: recall is that of
            single changes, which is too little.
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
    tokenizer = tokenizer or _tokenizer(model)
    probes = make_probes(documents, tokenizer, context_length, number, seed, measured)
    asked = [*(probe.questions for probe in probes), *make_asked(tokenizer, context_length, seed)]
    journal = Journal() if out is None else Journal(Path(out), identity_of(model, probes))
    was_training = model.training
    model.eval()
    try:
        return _Search(model, units, found, probes, asked, journal).run(budget, rounds, recall_weight)
    finally:
        revert_attention(model)
        model.train(was_training)


class _Search:
    """A model, its candidates and what was measured of them.

    Args:
        units: What candidates are chosen for.
        probes: Calibration texts.
        asked: Texts with answers, those of `probes` first.
        journal: Of all measurements; those it has are not made again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: list[Unit],
        candidates: list[Candidate],
        probes: list[Probe],
        asked: list[Probe],
        journal: Journal,
    ) -> None:
        self.model, self.units, self.journal = model, units, journal
        self.probes, self.asked = probes, asked
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self.dense = self.everywhere(DENSE)
        self._pasts: dict[int, Past] = {}
        self._take_over = all(self._takes_over(name) for name in self.candidates)

    def run(self, wanted: str | int | Budget, rounds: int, recall_weight: float) -> Plan:
        length = len(self.probes[0].ids) - 1
        empty = priced(self.model, self.units, self.candidates, length, wanted, self._seconds, recall_weight)
        empty.for_budget(empty.budget)  # one that cannot be kept is told before hours of measuring
        measured = {name: self.losses(self.everywhere(name), name) for name in self.candidates}
        start = measured[DENSE].total(recall_weight)
        has_past = self._take_over and self.past(0).cache is not None
        is_gated = has_past and all(map(can_be_gated, self.candidates.values()))
        found = self.single(
            replace(empty, measured=measured, start=start), recall_weight=0.0 if is_gated else recall_weight
        )
        if is_gated:
            revert_attention(self.model)
            candidates = list(self.candidates.values())
            texts = [(probe, self.past(number)) for number, probe in enumerate(self.probes)]
            found = choose_together(self.model, self.units, candidates, found, texts, self.asked, rounds)
        else:
            names = [name for name in self.candidates if name != DENSE]
            known = ratios(map(found.sum_of, names), [found.total(name) - start for name in names])
            found = replace(found, ratios=known).for_budget(found.budget)
        found = replace(found, measured=measured | {PLAN: self.losses(self.choice(found), PLAN)})
        logger.info("predicted %.5f, measured %.5f", found.predicted, found.total(PLAN))
        return found

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

    def single(self, empty: Plan, recall_weight: float) -> Plan:
        """Return a plan with the costs of single changes of the dense model."""
        firsts = list({unit.layer: unit for unit in reversed(self.units)}.values())
        every_key = Candidate("every key", SparseConfig(pattern="sliding_window", window=empty.context_length))
        unchanged, controls = (self.units[0], self.candidates[DENSE]), [(unit, every_key) for unit in firsts]
        pairs = [(unit, c) for unit in self.units for c in self.candidates.values() if c.name != DENSE]
        losses = self._changes([unchanged, *controls, *pairs])
        start = losses[unchanged]
        chance = Chance.of(start, {pair[0]: losses[pair] for pair in controls})
        layers = []
        for unit, row in zip(self.units, empty.layers, strict=True):
            found = {c.name: losses.get((unit, c), start) for c in self.candidates.values()}
            costs = {each: chance.cost(unit.layer, x, start, recall_weight) for each, x in found.items()}
            # That a few answers are likelier if a layer forgets is chance, too, and would add up to much.
            layers.append(replace(row, costs={each: max(cost, 0.0) for each, cost in costs.items()}))
        return replace(empty, layers=tuple(layers))

    def _changes(self, pairs: list[tuple[Unit, Candidate]]) -> dict[tuple[Unit, Candidate], Loss]:
        """Return the mean losses of single changes of the dense model on the ends of the calibration texts."""
        keys = {(unit, c): f"{unit} {c.name}" for unit, c in pairs}
        with tqdm(total=len(pairs) * len(self.probes), desc="single changes", unit="change") as bar:
            for number, probe in enumerate(self.probes):
                missing = [pair for pair in pairs if f"end {number}, {keys[pair]}" not in self.journal]
                bar.update(len(pairs) - len(missing))
                if missing:
                    for unit, candidate, loss in single_changes(
                        self.model, probe, self.past(number), self.dense, missing
                    ):
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
