"""The variants of one model that are compared: as it is, dense, and converted in several ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..attention import HybridAttention
from ..config import LinearConfig, MechanismConfig, SparseConfig, config_from_dict, make_config
from ..convert import convert_attention, exchanged, revert_attention
from ..integration import unload
from ..plans import DENSE, Plan
from ..recovery import load_adapter
from ..recovery.adapter_files import FILES, read
from ..recovery.adapter_names import local
from ..recovery.teacher import converted_layers, mechanism_of
from ..targets import choose_layers, find_targets

ADAPTER, PLANNED = "adapter", "plan"
PARTS = ("window", "linear")
NO_PARTS = "only linear attention with a window has parts to leave out; no layer is of this kind"
EVICTIONS_START_LATE = "Evictions start after the prompt: loglikelihoods are those of dense attention"


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: In reports.
        mechanism: "linear" or "sparse"; None for the model as it was given, DENSE for softmax attention, ADAPTER for
            what `save_adapter` wrote, PLANNED for what `Plan.save` wrote.
        options: Of the mechanism; of an adapter, its `folder` or name; of a plan, its `file`.
        part: "window" or "linear" to leave only this part of linear layers with a window; None for both.
    """

    name: str
    mechanism: str | None
    options: dict[str, Any] = field(default_factory=dict)
    part: str | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read what users type: `dense`, or a mechanism and its options as in
        `sparse:window=512,num_sinks=4,keep_softmax=[0,5]`; values are JSON, or else words. Or `adapter:NAME`, a
        folder or what else `load_adapter` takes, or `plan:FILE`.

        Raises:
            ValueError: if the text is not of this form.
        """
        mechanism, _, rest = text.partition(":")
        if mechanism == DENSE and not rest:
            return cls(DENSE, DENSE)
        if mechanism == ADAPTER and rest:
            return cls(text, ADAPTER, {"folder": rest})
        if mechanism == PLANNED and rest:
            return cls(text, PLANNED, {"file": rest})
        if mechanism not in ("linear", "sparse"):
            raise ValueError(
                "a variant is 'dense', 'adapter:NAME', 'plan:FILE', or 'linear' or 'sparse' with options behind a "
                f"colon; got {text!r}"
            )
        return cls(text, mechanism, dict(_option(part, text) for part in _split(rest)))

    def ablations(self) -> list[Variant]:
        """Return this variant with each of its parts alone."""
        return [replace(self, name=name_of_part(self.name, part), part=part) for part in PARTS]


def name_of_part(whole: str, part: str) -> str:
    """Return what a variant of which only one part is left is called."""
    return f"{whole}, {part} only"


def is_converted(model: PreTrainedModel) -> bool:
    """Whether any layer of `model` is converted."""
    return bool(converted_layers(model))


def mechanisms(model: PreTrainedModel, variant: Variant) -> list[MechanismConfig]:
    """Return how layers are converted in a variant, after its options have been checked; `model` stays as it is.

    Raises:
        TypeError, ValueError: as `convert_attention` does, and for a part of a variant that has none.
        FileNotFoundError: if an adapter is not there.
    """
    found: list[MechanismConfig] = []
    if variant.mechanism is None:
        found = [config_from_dict(layer) for layer in model.config.effattn["layers"] if layer]
    elif variant.mechanism == ADAPTER:
        saved = read(local(variant.options["folder"]))
        saved.check_whole()
        found = [config_from_dict(layer) for layer in saved.layers if layer]
    elif variant.mechanism == PLANNED:
        found = list(Plan.load(variant.options["file"]).configs().values())
    elif variant.mechanism != DENSE:
        options = dict(variant.options)
        layers, keep_softmax = options.pop("layers", None), options.pop("keep_softmax", None)
        config = make_config(variant.mechanism, options)
        found = [config for _ in choose_layers(find_targets(model), layers, keep_softmax)]
    if variant.part is not None and not any(config.kind == "hybrid" for config in found):
        raise ValueError(f"{variant.name}: {NO_PARTS}")
    return found


def digest_of(variant: Variant) -> str | None:
    """Return a digest of the files that a variant is made of; None for a variant without any."""
    paths = [Path(variant.options["file"])] if variant.mechanism == PLANNED else []
    if variant.mechanism == ADAPTER:
        folder = local(variant.options["folder"])
        paths = [folder / name for name in FILES]
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.hexdigest()[:16]


@contextmanager
def as_variant(model: PreTrainedModel, variant: Variant) -> Iterator[PreTrainedModel]:
    """Give `model` as `variant` says. What is dense or converted here is dense afterwards: variants that leave the
    model as it was given must come first."""
    if variant.mechanism is None:
        with _only(model, variant.part):
            yield model
        return
    revert_attention(model)
    tuned: Any = model
    if variant.mechanism == ADAPTER:
        tuned = load_adapter(model, variant.options["folder"])
    elif variant.mechanism == PLANNED:
        convert_attention(model, Plan.load(variant.options["file"]))
    elif variant.mechanism != DENSE:
        convert_attention(model, variant.mechanism, **variant.options)
    try:
        with _only(model, variant.part):
            yield model  # PEFT puts its layers into the model itself
    finally:
        if tuned is not model:
            unload(tuned)
        revert_attention(model)


@contextmanager
def _only(model: PreTrainedModel, part: str | None) -> Iterator[None]:
    """Leave only one part of linear layers with a window, with the feature maps they have learned."""
    if part is None:
        yield
        return
    found = {index: mechanism_of(module) for index, module in converted_layers(model).items()}
    hybrids = {index: whole for index, whole in found.items() if isinstance(whole, HybridAttention)}
    if not hybrids:
        raise ValueError(NO_PARTS)
    with exchanged(model, {index: _part_of(whole.options, part) for index, whole in hybrids.items()}) as alone:
        for index, new in alone.items():
            state = hybrids[index].state_dict()
            new.load_state_dict({name: state[name] for name in new.state_dict() if name in state}, strict=False)
        yield


def _part_of(options: LinearConfig, part: str) -> MechanismConfig:
    if part == "window":
        return SparseConfig(pattern="streaming", window=options.window, num_sinks=options.num_sinks)
    return replace(options, window=0, num_sinks=0)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part]


def _option(part: str, whole: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ValueError(f"options are name=value, separated by commas; got {part!r} in {whole!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value.strip()
