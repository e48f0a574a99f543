"""What each layer of a model computes, and what its cache costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from . import integration
from .architectures import head_counts
from .attention import HeadGeometry, Mechanism
from .targets import find_targets


@dataclass(frozen=True)
class LayerReport:
    """One layer at one context length.

    Args:
        index: The layer.
        mechanism: What it computes, with options; "softmax" if it is not converted.
        visible_keys: Keys the last token meets in softmax attention.
        cache_bytes: Bytes of the layer's cache for one row of a batch.
        flops_per_token: Floating-point operations of one decoding step, projections not counted.
        backend: Which code computes a prefill.
    """

    index: int
    mechanism: str
    visible_keys: int
    cache_bytes: int
    flops_per_token: int
    backend: str


@dataclass(frozen=True)
class AttentionReport:
    """All layers of a model at one context length; prints as a table.

    Args:
        context_length: Tokens the model has seen.
        layers: One record a layer.
    """

    context_length: int
    layers: list[LayerReport]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all layers for one row of a batch."""
        return sum(layer.cache_bytes for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "mechanism", "visible keys", "cache bytes", "FLOPs/token", "backend")
        rows = [
            (
                str(x.index),
                x.mechanism,
                f"{x.visible_keys:,}",
                f"{x.cache_bytes:,}",
                f"{x.flops_per_token:,}",
                x.backend,
            )
            for x in self.layers
        ]
        total = ("all", "", "", f"{self.cache_bytes:,}", f"{sum(x.flops_per_token for x in self.layers):,}", "")
        table = [header, *rows, total]
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        left = (1, 5)  # columns of text
        lines = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        rule = "-" * len(lines[0])
        title = f"attention at a context of {self.context_length:,} tokens, one row of a batch"
        return "\n".join(
            [title, lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:-1]), rule, lines[-1].rstrip()]
        )


def attention_report(model: PreTrainedModel, context_length: int = 4096) -> AttentionReport:
    """Report mechanism, visible keys, cache bytes and cost of every layer of `model`.

    Args:
        model: A model of a supported family, converted or not.
        context_length: Tokens the model has seen.

    Raises:
        ValueError: if `context_length` is not at least 1, or the family is not supported.
        RuntimeError: if a layer is configured as converted but would not compute its mechanism.
    """
    if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 1:
        raise ValueError(f"context_length must be an integer of at least 1; got {context_length!r}")
    records = [
        LayerReport(
            index,
            layer.describe(),
            layer.num_visible(context_length),
            layer.cache_bytes(context_length, model.dtype),
            layer.flops_per_token(context_length),
            layer.backend(model.device.type),
        )
        for index, layer in _layers(model).items()
    ]
    return AttentionReport(context_length, records)


@dataclass(frozen=True)
class Softmax:
    """An attention layer that is not converted, asked what a mechanism is asked.

    Args:
        geometry: Its heads.
        window: Visible keys of a layer with a window of its own, the query's own included; None for all.
        implementation: transformers' name of the code that computes it.
    """

    geometry: HeadGeometry
    window: int | None
    implementation: str

    def describe(self) -> str:
        return "softmax" if self.window is None else f"softmax (window={self.window}, its own)"

    def num_visible(self, context_length: int) -> int:
        return context_length if self.window is None else min(context_length, self.window)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        kept = context_length if self.window is None else min(context_length, self.window - 1)
        g = self.geometry
        return g.num_kv_heads * (g.head_dim + g.value_dim) * kept * dtype.itemsize

    def flops_per_token(self, context_length: int) -> int:
        return self.geometry.softmax_flops(self.num_visible(context_length))

    def backend(self, device: str) -> str:
        return self.implementation


def _layers(model: PreTrainedModel) -> dict[int, Mechanism | Softmax]:
    """Return what computes each attention layer; a layer that would not compute what it is said to is an error."""
    targets = find_targets(model)
    specs = (getattr(model.config, "effattn", None) or {}).get("layers", [None] * len(targets.natives))
    found: dict[int, Mechanism | Softmax] = {}
    for index, module in targets.modules.items():
        mechanism, spec = getattr(module, "effattn", None), specs[index]
        if (spec is not None) != (mechanism is not None) or (spec and not integration.is_attached(module)):
            raise RuntimeError(
                f"layer {index} is configured as {spec} but does not compute it; convert the model again"
            )
        found[index] = mechanism or Softmax(
            HeadGeometry(*head_counts(module, model.config)),
            targets.natives[index].window,
            str(model.config._attn_implementation),
        )
    return found
