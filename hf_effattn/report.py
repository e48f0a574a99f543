"""What each layer of a model computes, and what its cache costs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .convert import converted_layers, softmax_layers


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
    records = []
    softmax = softmax_layers(model)
    for index, mechanism in converted_layers(model).items():
        if mechanism is None:
            geometry, native = softmax[index]
            visible = context_length if native.window is None else min(context_length, native.window)
            kept = context_length if native.window is None else min(context_length, native.window - 1)
            size = geometry.num_kv_heads * (geometry.head_dim + geometry.value_dim) * kept * model.dtype.itemsize
            name = "softmax" if native.window is None else f"softmax (window={native.window}, its own)"
            backend = str(model.config._attn_implementation)
            records.append(LayerReport(index, name, visible, size, geometry.softmax_flops(visible), backend))
            continue
        records.append(
            LayerReport(
                index,
                mechanism.describe(),
                mechanism.num_visible(context_length),
                mechanism.cache_bytes(context_length, model.dtype),
                mechanism.flops_per_token(context_length),
                mechanism.backend(),
            )
        )
    return AttentionReport(context_length, records)
