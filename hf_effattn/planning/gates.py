"""Layers that attend in all ways they could be given at once, weighed by gates, in which a loss has a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention import HeadGeometry, Mechanism, make_mechanism
from ..attention.base import Call
from ..config import MechanismConfig, SparseConfig
from ..convert import convert_attention, revert_attention
from ..plans.heads import Unit
from ..targets import find_targets
from .candidates import Candidate


class Gated(Mechanism):
    """Attention between candidates: `o_h = Σ_c g_hc o_hc`, with gates g of each key/value head. With one gate 1 and the
    others 0 it is that candidate. Gates of heads that see everything or little are those of DuoAttention (arXiv
    2410.10819). Nothing is computed of candidates that are shut where nobody wants gradients, so gates stay as they are
    as long as a cache is in use.

    Args:
        config: Of the layer; it has no meaning here.
        parts: The candidates.
    """

    def __init__(self, config: MechanismConfig, geometry: HeadGeometry, parts: Sequence[Mechanism]) -> None:
        super().__init__(config, geometry)
        self.parts = nn.ModuleList(parts)
        self.gates: torch.Tensor | None = None  # [G or 1, C], or [B, G or 1, C]

    def attend(
        self, state: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, Any]:
        assert self.gates is not None
        gates = self.gates.to(query).repeat_interleave(query.shape[1] // self.gates.shape[-2], dim=-2)
        total, states, has_gradient = query.new_zeros(()), self._states(state), torch.is_grad_enabled()
        for index, part in self._computed():
            # Through a shut one nothing flows back but its gates.
            with torch.set_grad_enabled(has_gradient and self._is_open(index)):
                output, states[index] = part.attend(states[index], query, key, value, call)
            total = total + gates[..., index, None, None] * output
        return total, states

    def advance(self, state: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> Any:
        states = self._states(state)
        for index, part in self._computed():
            states[index] = part.advance(states[index], query, key, value, call)
        return states

    def describe(self) -> str:
        return "gated " + ", ".join(part.describe() for part in self._parts())

    def _states(self, state: Any) -> list[Any]:
        return [None] * len(self.parts) if state is None else list(state)

    def _is_open(self, index: int) -> bool:
        assert self.gates is not None
        return bool(self.gates[..., index].any())

    def _computed(self) -> list[tuple[int, Mechanism]]:
        """The candidates that are open, or whose gates have gradients."""
        has_gradient = torch.is_grad_enabled()
        return [(i, part) for i, part in enumerate(self._parts()) if has_gradient or self._is_open(i)]

    def _parts(self) -> list[Mechanism]:
        return list(self.parts)  # type: ignore[arg-type]


def can_be_gated(candidate: Candidate) -> bool:
    """Whether a candidate is computed from queries and keys as they are, and with gradients."""
    config = candidate.config
    if config is None:
        return True
    mechanism = make_mechanism(config, HeadGeometry(2, 2, 16, 16, 32))
    plain = not (mechanism.before_rotary or mechanism.rolls or mechanism.num_gates or mechanism.needs_queries)
    return plain and getattr(config, "selector", None) is None


class Gates:
    """The gates of all layers of a model.

    Args:
        units: What each row of gates belongs to.
        layers: The gated attention of each layer.
    """

    def __init__(self, units: Sequence[Unit], layers: dict[int, Gated]) -> None:
        self.rows = {index: [i for i, unit in enumerate(units) if unit.layer == index] for index in layers}
        self.layers = layers

    def set(self, gates: torch.Tensor) -> None:
        """Let the layers attend as `gates` say, `[units, C]`, or `[B, units, C]` for each text of a batch."""
        for index, layer in self.layers.items():
            layer.gates = gates[..., self.rows[index], :]

    @contextmanager
    def at(self, gates: torch.Tensor) -> Iterator[torch.Tensor]:
        """Let the layers attend as `gates` say; yield a copy, in which what is computed inside has gradients."""
        with torch.enable_grad():
            leaf = gates.detach().clone().requires_grad_()
            self.set(leaf)
            yield leaf


@contextmanager
def gated(
    model: PreTrainedModel, units: Sequence[Unit], candidates: Sequence[Candidate], length: int
) -> Iterator[Gates]:
    """Let the layers of `units` attend in the way of all candidates, until the end of the block; then the model is
    dense.

    Args:
        length: Of the texts, at most: for softmax attention to all keys.
    """
    every_key = SparseConfig(pattern="sliding_window", window=length)
    indices = list(dict.fromkeys(unit.layer for unit in units))
    targets = find_targets(model)
    parts: dict[int, list[Any]] = {index: [] for index in indices}
    for candidate in candidates:
        convert_attention(model, candidate.config or every_key, layers=indices)
        for index in indices:
            parts[index].append(targets.modules[index].effattn)
    layers = {index: Gated(own[0].options, own[0].geometry, own) for index, own in parts.items()}
    for index, layer in layers.items():
        targets.attach(index, layer)
    try:
        yield Gates(units, layers)
    finally:
        revert_attention(model)
