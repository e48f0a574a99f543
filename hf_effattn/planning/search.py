"""The search for a plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import head_counts
from ..config import MechanismConfig
from ..convert import revert_attention
from ..evaluation.variants import is_converted
from ..notation import whole_number
from ..plans import DENSE, PLAN, Budget, Plan
from ..plans.heads import Unit
from ..plans.scale import ratios
from ..targets import choose_layers, find_targets
from .candidates import check_for_heads, default_candidates, read_candidates
from .gates import can_be_gated
from .journal import Journal, identity_of
from .measurements import Measurements
from .prices import priced
from .probes import Batch, make_asked, make_probes
from .together import choose_together

logger = logging.getLogger(__name__)

RECALL_WEIGHT, ROUNDS = 0.2, 5


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
    earlier: Plan | None = None,
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
        recall_weight: What a nat of an answer's token counts beside one of the documents, 0 or more; less for budgets
            that cannot keep recall anyway. To choices an answer of n tokens that lose x nats each counts
            `(1 - exp(-n x)) / n`.
        rounds: Of the search, and steps to better choices. With candidates other than patterns and linear attention as
            they come (selectors, mechanisms that read more than queries and keys), there are none: recall is that of
            single changes, which is too little.
        by_head: Choose for each key/value head, not for each layer; candidates are then windows, with or without sinks.
        measured: Tokens at the end of each text, before the questions, on which single changes are measured.
        out: Folder for measurements; a run that was killed goes on from it.
        seed: Of what is hidden.
        earlier: A plan among the same candidates, for any budget and recall weight, from which steps go on without a
            search before them. Single changes are measured all the same, if `out` has none.

    Returns:
        The plan, for `convert_attention`.

    Raises:
        TypeError, ValueError: for a converted model, documents that are too short or too few, budgets that cannot be
            kept, unknown candidates, and an earlier plan for something else.
    """
    whole_number("context_length", context_length, 2)
    whole_number("number", number, 1)
    whole_number("rounds", rounds, 1)
    whole_number("measured", measured, 1)
    if not recall_weight >= 0:
        raise ValueError(f"recall_weight must be 0 or more, got {recall_weight}")
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
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(False):  # the search has gradients
            probes = make_probes(documents, tokenizer, context_length, number, seed, measured)
            asked: list[Batch] = [[probe.questions] for probe in probes]
            asked += make_asked(tokenizer, context_length, seed) if recall_weight else []
            journal = Journal() if out is None else Journal(Path(out), identity_of(model, probes))
            own = Measurements(model, units, found, probes, journal)
            return _search(own, asked, budget, rounds, recall_weight, earlier)
    finally:
        revert_attention(model)
        model.train(was_training)


def _search(
    own: Measurements,
    asked: list[Batch],
    wanted: str | int | Budget,
    rounds: int,
    recall_weight: float,
    earlier: Plan | None,
) -> Plan:
    """Return the plan for a budget: by prices, single changes, and then all layers together where there are gates."""
    model, units, candidates = own.model, own.units, list(own.candidates.values())
    length = len(own.probes[0].ids) - 1
    empty = priced(model, units, own.candidates, length, wanted, own.seconds, recall_weight)
    empty.for_budget(empty.budget)  # one that cannot be kept is told before hours of measuring
    first = None if earlier is None else _first(earlier, empty)
    is_gated = own.has_pasts and all(map(can_be_gated, candidates))
    if first is not None and not is_gated:
        raise ValueError("plans with candidates, or for models, that have no gates are not refined: leave out earlier=")
    measured = {name: own.losses(own.everywhere(name), name) for name in own.candidates}
    start = measured[DENSE].total(recall_weight)
    found = own.single(replace(empty, measured=measured, start=start), 0.0 if is_gated else recall_weight)
    if is_gated:
        revert_attention(model)
        texts = [(probe, own.past(number)) for number, probe in enumerate(own.probes)]
        found = choose_together(model, units, candidates, found, texts, asked, rounds, own.journal, first)
    else:
        names = [name for name in own.candidates if name != DENSE]
        known = ratios(map(found.sum_of, names), [found.total(name) - start for name in names])
        found = replace(found, ratios=known).for_budget(found.budget)
    found = replace(found, measured=measured | {PLAN: own.losses(own.choice(found), PLAN)})
    logger.info("predicted %.5f, measured %.5f", found.predicted, found.total(PLAN))
    return found


def _first(earlier: Plan, empty: Plan) -> Plan:
    """Return what an earlier plan chooses for the budget of a new one.

    Raises:
        ValueError: if they are not for the same choices.
    """
    for name in ("model_type", "num_layers", "context_length", "candidates"):
        before, now = getattr(earlier, name), getattr(empty, name)
        if before != now:
            shown = [list(x) if isinstance(x, dict) else x for x in (before, now)]
            raise ValueError(f"the earlier plan has another {name.replace('_', ' ')}: {shown[0]}, not {shown[1]}")
    if [(x.index, x.head, x.prices) for x in earlier.layers] != [(x.index, x.head, x.prices) for x in empty.layers]:
        raise ValueError("the earlier plan is for other layers, heads or prices: plan with its by_head, dtype and unit")
    return earlier.for_budget(empty.budget)


def _tokenizer(model: PreTrainedModel) -> Any:
    name = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"found no tokenizer in {name!r}; give tokenizer=") from error
