"""What candidates cost: bytes of the cache, or time of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from ..architectures import head_counts
from ..attention import HeadGeometry, make_mechanism
from ..config import SparseConfig
from ..plans import DENSE, Budget, LayerChoice, Plan
from ..plans.budget import BYTES
from ..plans.heads import Unit
from ..report import attention_report
from ..targets import find_targets
from .candidates import Candidate
from .measure import assign

Prices = dict[Unit, dict[str, float]]
EVERY_KEY = SparseConfig(pattern="sliding_window", window=(None,))  # of a head that keeps all, in a layer of others


def priced(
    model: PreTrainedModel,
    units: Sequence[Unit],
    candidates: dict[str, Candidate],
    context_length: int,
    wanted: str | int | Budget,
    seconds: Callable[[str], float],
    recall_weight: float,
) -> Plan:
    """Return a plan that knows what everything costs, and nothing of losses.

    Args:
        seconds: `seconds(name)` of a decoding step with a candidate in all layers.

    Raises:
        TypeError, ValueError: for what is no budget, and a speed as that of single heads.
    """
    assign(model, {})
    report, model_type = attention_report(model, context_length), str(model.config.model_type)
    budget = Budget.parse(wanted, report.cache_bytes)
    dense_price, fixed = float(report.cache_bytes), 0.0
    if budget.unit == BYTES:
        converted = {unit.layer for unit in units}
        fixed = float(sum(x.cache_bytes for x in report.layers if x.index not in converted))
        by_head = any(unit.head is not None for unit in units)
        prices = (_of_heads if by_head else _of_layers)(model, units, candidates, context_length)
    elif any(unit.head is not None for unit in units):
        raise ValueError("what a head takes of a decoding step is not known; give bytes as a budget, or plan by layers")
    else:
        dense_price = seconds(DENSE)
        each = {name: seconds(name) / len(units) for name in candidates}
        prices = dict.fromkeys(units, each)
    return Plan(
        model_type=model_type,
        num_layers=len(find_targets(model).natives),
        context_length=context_length,
        budget=budget,
        dense_price=dense_price,
        fixed_price=fixed,
        candidates={name: candidate.spec for name, candidate in candidates.items()},
        layers=tuple(LayerChoice(x.layer, DENSE, prices[x], dict.fromkeys(candidates, 0.0), x.head) for x in units),
        start=0.0,
        ratios=(),
        recall_weight=recall_weight,
        measured={},
    )


def _of_layers(
    model: PreTrainedModel, units: Sequence[Unit], candidates: dict[str, Candidate], context_length: int
) -> Prices:
    prices: Prices = {unit: {} for unit in units}
    for name, candidate in candidates.items():
        assign(model, dict.fromkeys(units, candidate))
        own = {x.index: float(x.cache_bytes) for x in attention_report(model, context_length).layers}
        for unit in units:
            prices[unit][name] = own[unit.layer]
    return prices


def _of_heads(
    model: PreTrainedModel, units: Sequence[Unit], candidates: dict[str, Candidate], context_length: int
) -> Prices:
    """Return what each head needs in a store of its own, which is a little more than in one that it shares."""
    modules = find_targets(model).modules
    own: dict[int, dict[str, float]] = {}
    for layer in dict.fromkeys(unit.layer for unit in units):
        g = HeadGeometry(*head_counts(modules[layer], model.config))
        alone = HeadGeometry(g.num_heads // g.num_kv_heads, 1, g.head_dim, g.value_dim)
        stores = {name: make_mechanism(x.config or EVERY_KEY, alone) for name, x in candidates.items()}
        own[layer] = {name: float(x.cache_bytes(context_length, model.dtype)) for name, x in stores.items()}
    return {unit: own[unit.layer] for unit in units}
