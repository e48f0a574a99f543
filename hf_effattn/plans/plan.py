"""A plan: what becomes of each layer, what that costs, and what was measured to find it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import MechanismConfig, config_from_dict
from .budget import BYTES, Budget
from .heads import of_layer
from .knapsack import choose
from .scale import Ratios, ratio_at

PLAN, DENSE = "this plan", "dense"


class Loss(NamedTuple):
    """Losses of a model on the calibration texts, in nats a token.

    Args:
        text: Of the documents.
        recall: Of the answers to questions about what was hidden before.
        divergence: KL divergence from the dense model's predictions of the documents. It is the loss of text that is to
            be expected: on a few texts a model may do better by chance, but never diverge less than not at all, so
            divergences of single layers add up where losses of text would not.
    """

    text: float
    recall: float
    divergence: float

    def total(self, recall_weight: float) -> float:
        """Return what a plan makes as small as it can."""
        return self.divergence + recall_weight * self.recall


@dataclass(frozen=True)
class LayerChoice:
    """One layer, or a key/value head of it, and what was measured of it.

    Args:
        index: The layer.
        choice: Name of its candidate.
        prices: Of each candidate in the unit of the budget.
        costs: Of each candidate: nats a token, weighted recall included, that the end of a text loses if this alone is
            changed to it where the measuring began.
        head: None for all of the layer.
    """

    index: int
    choice: str
    prices: dict[str, float]
    costs: dict[str, float]
    head: int | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer of a model; `convert_attention(plan)` does it. `print` shows it as a table.

    Args:
        model_type, num_layers: Of the model it was made for.
        context_length: Tokens at which all was measured.
        budget: The limit.
        dense_price: What softmax attention in all layers costs.
        fixed_price: What layers cost that cannot be converted.
        candidates: By name, the configs as JSON-able data; None for a layer left as it is.
        layers: Each layer that can be converted, or each of its heads, in order.
        start: The loss, recall weighted, of the model around which the costs were measured.
        ratios: What sums of costs stand for in the loss of a whole model (see `ratio_at`).
        recall_weight: What a nat of recall counts for.
        measured: Losses of the dense model, of each candidate in all layers, and of the plan ("this plan").
    """

    model_type: str
    num_layers: int
    context_length: int
    budget: Budget
    dense_price: float
    fixed_price: float
    candidates: dict[str, dict[str, Any] | None]
    layers: tuple[LayerChoice, ...]
    start: float
    ratios: Ratios
    recall_weight: float
    measured: dict[str, Loss]

    @property
    def price(self) -> float:
        """What the plan costs, in the unit of the budget."""
        return self.fixed_price + sum(layer.prices[layer.choice] for layer in self.layers)

    @property
    def least_price(self) -> float:
        """What the cheapest candidate of each layer costs, in the unit of the budget."""
        return self.fixed_price + sum(min(layer.prices.values()) for layer in self.layers)

    def price_of(self, name: str) -> float:
        """Return what a candidate in all layers costs, in the unit of the budget."""
        return self.fixed_price + sum(layer.prices[name] for layer in self.layers)

    @property
    def predicted(self) -> float:
        """The loss, recall weighted, that is to be expected."""
        return self.start + self.sum * ratio_at(self.ratios, self.sum)

    @property
    def sum(self) -> float:
        """What the choices lose by themselves, added up."""
        return sum(layer.costs[layer.choice] for layer in self.layers)

    def sum_of(self, name: str) -> float:
        """Return what single changes to a candidate lose, added up over all layers."""
        return sum(layer.costs[name] for layer in self.layers)

    def configs(self) -> dict[int, MechanismConfig]:
        """Return the config of each layer that is converted."""
        specs = {i: of_layer([self.candidates[x.choice] for x in rows]) for i, rows in self._by_layer().items()}
        return {index: config_from_dict(spec) for index, spec in specs.items() if spec is not None}

    def _by_layer(self) -> dict[int, list[LayerChoice]]:
        rows: dict[int, list[LayerChoice]] = {}
        for row in self.layers:
            rows.setdefault(row.index, []).append(row)
        return rows

    def for_budget(self, budget: str | int | Budget) -> Plan:
        """Return the plan for another budget of the same unit, from the same measurements, not refined; its own
        loss is predicted only. For the budget that it was made and measured for it is the plan itself.

        Raises:
            ValueError: for a budget that no choice keeps, or of another unit.
        """
        wanted = Budget.parse(budget, round(self.dense_price))
        if wanted.unit != self.budget.unit:
            raise ValueError(f"the prices of this plan are in {self.budget.unit}; plan again for {wanted.unit}")
        if wanted == self.budget and PLAN in self.measured:
            return self
        names = list(self.candidates)
        costs = [[layer.costs[name] for name in names] for layer in self.layers]
        prices = [[layer.prices[name] for name in names] for layer in self.layers]
        found = choose(costs, prices, wanted.limit - self.fixed_price)
        if found is None:
            raise ValueError(
                f"the budget of {wanted.show(wanted.limit)} cannot be kept: the cheapest candidates need "
                f"{wanted.show(self.least_price)}; raise it, or give cheaper candidates"
            )
        layers = tuple(replace(x, choice=names[i]) for x, i in zip(self.layers, found, strict=True))
        measured = {name: loss for name, loss in self.measured.items() if name != PLAN}
        return replace(self, budget=wanted, layers=layers, measured=measured)

    def total(self, name: str) -> float:
        """Return a measured loss, recall weighted; answers that are likelier than those of the dense model count as
        much as its own, as they make up for nothing."""
        own = self.measured[name]
        return own._replace(recall=max(own.recall, self.measured[DENSE].recall)).total(self.recall_weight)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able data."""
        data = asdict(self)
        data["measured"] = {name: loss._asdict() for name, loss in self.measured.items()}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read back what `to_dict` wrote."""
        return cls(
            **data
            | {
                "budget": Budget(**data["budget"]),
                "layers": tuple(LayerChoice(**layer) for layer in data["layers"]),
                "ratios": tuple((total, ratio) for total, ratio in data["ratios"]),
                "measured": {name: Loss(**loss) for name, loss in data["measured"].items()},
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: if the file holds none.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no plan: {error}") from error

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the prices and losses that budgets have, and the map of the layers; return the figure of matplotlib.

        Args:
            path: Where to write it as a PNG.

        Raises:
            ImportError: without matplotlib, which the extra `plots` installs.
        """
        from .drawing import draw

        figure = draw(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def __str__(self) -> str:
        rows = [("layer", "attention", "price", "loses [nats/token]")]
        for index, found in self._by_layer().items():
            cost = sum(x.costs[x.choice] - x.costs.get(DENSE, 0.0) for x in found)
            price = self._price(sum(x.prices[x.choice] for x in found))
            rows.append((str(index), _names(found), price, f"{cost:+.5f}"))
        rows.append(("all", "", self._price(self.price), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        return "\n".join([*table, "", *self._summary()])

    def _price(self, price: float) -> str:
        return f"{price:,.0f} B" if self.budget.unit == BYTES else f"{1e3 * price:,.2f} ms"

    def _summary(self) -> list[str]:
        lines = [
            f"{self.model_type}, {self.context_length:,} tokens, budget {self.budget.show(self.budget.limit)}, "
            f"spent {self.budget.show(self.price)}"
        ]
        for name, loss in self.measured.items():
            ratio = math.exp(loss.text - self.measured[DENSE].text)
            lines.append(
                f"{name}: perplexity {math.exp(loss.text):.3f} ({ratio:.4f}x), {loss.divergence:.5f} nats from dense, "
                f"recall {loss.recall:.3f} nats"
            )
        more = self.predicted - self.total(DENSE)
        told = f"predicted to lose {more:.5f} nats a token, recall counted {self.recall_weight:g}"
        if PLAN in self.measured:
            told += f"; measured {self.total(PLAN) - self.total(DENSE):.5f}"
        return [*lines, told]


def _names(heads: list[LayerChoice]) -> str:
    """The candidates of a layer: one, or one for each of its heads."""
    names = [each.choice for each in heads]
    return names[0] if len(set(names)) == 1 else " | ".join(names)
