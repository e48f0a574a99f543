"""The search for a plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import MechanismConfig
from ..convert import revert_attention
from ..evaluation.variants import is_converted
from ..notation import whole_number
from ..plans import DENSE, PLAN, Budget, LayerChoice, Loss, Plan
from ..plans.budget import BYTES
from ..report import attention_report
from ..targets import choose_layers, find_targets
from .candidates import Candidate, default_candidates, read_candidates
from .journal import Journal, identity_of
from .measure import assign, logits_of, loss_of, single_changes
from .probes import Probe, make_probes
from .speed import step_seconds

logger = logging.getLogger(__name__)
Choice = dict[int, Candidate]


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
    rounds: int = 2,
    out: str | Path | None = None,
    seed: int = 42,
) -> Plan:
    """Choose the attention of each layer so that a budget is kept and as little as possible is lost.

    Each layer of the dense model by itself is changed to each candidate, and it is measured how far predictions of
    documents then are from those of the dense model (KL divergence), and what the answers to questions about things
    hidden far before lose, so that a plan does not buy perplexity with recall. The least sum within the budget is the
    plan, if losses add up; so it is measured as a whole, and the changes are measured again around it, while that makes
    it better. The logits of the dense model on the calibration texts are kept in memory.

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
        rounds: How often all changes are measured.
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
    targets = find_targets(model)
    if is_converted(model):
        raise ValueError("the model is converted already; revert_attention first")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context_length > longest:
        raise ValueError(f"context_length={context_length} is more than the {longest} positions of the model")
    found = read_candidates(default_candidates(context_length) if candidates is None else candidates)
    layers = choose_layers(targets, None, None)
    probes = make_probes(documents, tokenizer or _tokenizer(model), context_length, number, seed)
    journal = Journal() if out is None else Journal(Path(out), identity_of(model, probes))
    was_training = model.training
    model.eval()
    try:
        return _Search(model, layers, found, probes, journal, recall_weight).run(budget, rounds)
    finally:
        revert_attention(model)
        model.train(was_training)


class _Search:
    """A model, its candidates and what was measured of them.

    Args:
        layers: Those that may be converted.
        journal: Of all measurements; those it has are not made again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[int],
        candidates: list[Candidate],
        probes: list[Probe],
        journal: Journal,
        recall_weight: float,
    ) -> None:
        self.model, self.layers, self.probes = model, layers, probes
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self.journal, self.recall_weight = journal, recall_weight
        self._dense: dict[int, torch.Tensor] = {}
        self.context_length = len(probes[0].ids) - 1
        self.model_type = str(model.config.model_type)

    def run(self, wanted: str | int | Budget, rounds: int) -> Plan:
        empty = self._priced(wanted)
        empty.for_budget(empty.budget)  # one that cannot be kept is told before hours of measuring
        measured = {name: self.losses(self.everywhere(name), name) for name in self.candidates}
        empty = replace(empty, measured=measured)
        base = self.everywhere(DENSE)
        best: Plan | None = None
        for round_number in range(rounds):
            new = self.around(base, empty, f"round {round_number + 1}").for_budget(empty.budget)
            choice = self.choice(new)
            new = replace(new, measured=measured | {PLAN: self.losses(choice, PLAN)})
            logger.info("round %d: predicted %.5f, measured %.5f", round_number + 1, new.predicted, new.total(PLAN))
            if best is not None and new.total(PLAN) >= best.total(PLAN):
                break
            best = new
            if choice == base:
                break
            base = choice
        assert best is not None
        return best

    def everywhere(self, name: str) -> Choice:
        return dict.fromkeys(self.layers, self.candidates[name])

    def choice(self, found: Plan) -> Choice:
        return {layer.index: self.candidates[layer.choice] for layer in found.layers}

    def losses(self, choice: Choice, name: str) -> Loss:
        """Return the mean losses of a model with this choice."""
        keys = [f"{number} {self._key(choice)}" for number in range(len(self.probes))]
        missing = [number for number, key in enumerate(keys) if key not in self.journal]
        for number in tqdm(missing, desc=name, unit="text", disable=not missing):
            own = dense = self.dense_logits(number)
            if name != DENSE:
                assign(self.model, choice)
                own = logits_of(self.model, self.probes[number])
            self.journal.add(keys[number], loss_of(own, self.probes[number], dense))
        return _mean([self.journal.loss(key) for key in keys])

    def dense_logits(self, number: int) -> torch.Tensor:
        """Return the logits of the dense model on a calibration text, which are kept in memory."""
        if number not in self._dense:
            revert_attention(self.model)
            self._dense[number] = logits_of(self.model, self.probes[number])
        return self._dense[number]

    def around(self, base: Choice, empty: Plan, name: str) -> Plan:
        """Return a plan with the costs of single changes of `base`."""
        pairs = [(i, c) for i in self.layers for c in self.candidates.values() if c != base[i]]
        with tqdm(total=len(pairs) * len(self.probes), desc=name, unit="change") as bar:
            for number, probe in enumerate(self.probes):
                keys = {pair: f"{number} {self._key(base | dict([pair]))}" for pair in pairs}
                missing = [pair for pair in pairs if keys[pair] not in self.journal]
                bar.update(len(pairs) - len(missing))
                dense = self.dense_logits(number) if missing else torch.empty(0)
                for index, candidate, loss in single_changes(self.model, probe, dense, base, missing):
                    self.journal.add(keys[index, candidate], loss)
                    bar.update()
        start = self.losses(base, name).total(self.recall_weight)
        layers = []
        for layer in empty.layers:
            changed = {each: base | {layer.index: c} for each, c in self.candidates.items()}
            costs = {each: self.losses(c, name).total(self.recall_weight) - start for each, c in changed.items()}
            # That a few answers are likelier if a layer forgets is chance, and would add up to much.
            least = min(costs[DENSE], 0.0)
            costs = {each: max(cost, least) for each, cost in costs.items()}
            layers.append(replace(layer, choice=base[layer.index].name, costs=costs))
        return replace(empty, start=start, layers=tuple(layers))

    def _priced(self, wanted: str | int | Budget) -> Plan:
        """Return a plan that knows what everything costs, and nothing of losses."""
        reports = {}
        for name in self.candidates:
            assign(self.model, self.everywhere(name))
            reports[name] = attention_report(self.model, self.context_length)
        dense = reports[DENSE]
        budget = Budget.parse(wanted, dense.cache_bytes)
        own = {name: {x.index: float(x.cache_bytes) for x in report.layers} for name, report in reports.items()}
        fixed = sum(bytes_ for index, bytes_ in own[DENSE].items() if index not in self.layers)
        if budget.unit != BYTES:
            fixed = 0.0
            seconds = {name: self._seconds(name) / len(self.layers) for name in self.candidates}
            own = {name: dict.fromkeys(self.layers, each) for name, each in seconds.items()}
        prices = {i: {name: own[name][i] for name in own} for i in self.layers}
        nothing = dict.fromkeys(self.candidates, 0.0)
        return Plan(
            model_type=self.model_type,
            num_layers=len(find_targets(self.model).natives),
            context_length=self.context_length,
            budget=budget,
            fixed_price=fixed,
            candidates={n: None if c.config is None else c.config.to_dict() for n, c in self.candidates.items()},
            layers=tuple(LayerChoice(i, DENSE, prices[i], nothing) for i in self.layers),
            start=0.0,
            recall_weight=self.recall_weight,
            measured={},
        )

    def _seconds(self, name: str) -> float:
        key = f"seconds {name}"
        if key not in self.journal:
            assign(self.model, self.everywhere(name))
            self.journal.add(key, step_seconds(self.model, self.probes[0].ids[:-1]))
        return float(self.journal.known[key])

    def _key(self, choice: Choice) -> str:
        return ",".join(choice[index].name for index in self.layers)


def _mean(losses: list[Loss]) -> Loss:
    return Loss(*torch.tensor(losses, dtype=torch.float64).mean(dim=0).tolist())


def _tokenizer(model: PreTrainedModel) -> Any:
    name = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"found no tokenizer in {name!r}; give tokenizer=") from error
