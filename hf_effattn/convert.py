"""Conversion of a pretrained model, in place, and its way back."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from . import integration
from .architectures import ARCHITECTURES, Architecture
from .attention import HeadGeometry, Mechanism, make_mechanism
from .config import MechanismConfig, config_from_dict, make_config

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def convert_attention(
    model: Model,
    mechanism: str | MechanismConfig,
    *,
    layers: Iterable[int] | None = None,
    keep_softmax: Iterable[int] | None = None,
    **options: Any,
) -> Model:
    """Replace the softmax attention of a causal language model, in place, by linear or sparse attention.

    Projections, norms, rotary, names and classes of modules stay; `generate()` gets a cache that fits. Calls add up,
    so layers may differ; converting a layer again replaces its mechanism. Every check comes before the first change.

    Args:
        model: A transformers model of a supported family.
        mechanism: "linear" or "sparse", or a `LinearConfig` or `SparseConfig`.
        layers: Indices of the layers to convert, negative ones from the end; None for all.
        keep_softmax: Indices of layers to leave as they are, all others being converted. Not together with `layers`.
        options: Fields of `LinearConfig` or `SparseConfig`.

    Returns:
        The model itself.

    Raises:
        TypeError: if `model` is no transformers model, or an option has the wrong type.
        ValueError: for an unknown mechanism, option or value, layers out of range, and models that cannot be
            converted: unsupported families, cross-attention, offloaded weights. The model is then as it was.
    """
    architecture = _architecture(model)
    modules = _attention_modules(model, architecture)
    config = make_config(mechanism, options)
    chosen = _choose(len(modules), layers, keep_softmax)
    made = {index: _make(config, architecture, modules[index], model.config) for index in chosen}
    _freeze_under_peft(model, made)
    integration.become_converted(model)
    for index, new in made.items():
        integration.attach(modules[index], new, architecture.cache_argument)
        model.config.effattn["layers"][index] = config.to_dict()
    _finish(model, architecture, modules)
    return model


def revert_attention(model: Model) -> Model:
    """Give `model` back its softmax attention, classes and config, bit for bit; learned maps are dropped.

    Returns:
        The model itself. A model that is not converted stays as it is.
    """
    architecture = _architecture(model)
    modules = _attention_modules(model, architecture)
    if not getattr(model.config, "is_effattn", False):
        return model
    for module in modules.values():
        if hasattr(module, "effattn"):
            integration.detach(module, model.config)
    for embedding in _position_embeddings(model, architecture):
        integration.unguard_positions(embedding)
    if model.config._attn_implementation == integration.NAME:
        model.config._attn_implementation_internal = "sdpa"
    integration.become_original(model)
    return model


def converted_layers(model: PreTrainedModel) -> dict[int, Mechanism | None]:
    """Return the mechanism of each layer, None for softmax.

    Raises:
        RuntimeError: if a layer is said to be converted, but would not compute its mechanism.
    """
    modules = _attention_modules(model, _architecture(model, check=False))
    found = {index: getattr(module, "effattn", None) for index, module in sorted(modules.items())}
    specs = (getattr(model.config, "effattn", None) or {}).get("layers", [None] * len(found))
    for index, spec in enumerate(specs):
        if (spec is not None) != (found[index] is not None) or (spec and not integration.is_attached(modules[index])):
            raise RuntimeError(
                f"layer {index} is configured as {spec} but does not compute it; convert the model again"
            )
    return found


def layer_geometry(model: PreTrainedModel, index: int) -> HeadGeometry:
    """Return the heads of layer `index`."""
    architecture = _architecture(model, check=False)
    return HeadGeometry(*architecture.heads(_attention_modules(model, architecture)[index], model.config))


def _build(model: PreTrainedModel) -> None:
    """Attach mechanisms to a freshly constructed model as its config says (called before weights are loaded)."""
    architecture = _architecture(model, check=False)
    modules = _attention_modules(model, architecture)
    specs, version = model.config.effattn["layers"], model.config.effattn.get("version")
    if version != integration.FORMAT_VERSION:
        raise ValueError(
            f"this conversion was saved in format {version}; this hf_effattn reads format {integration.FORMAT_VERSION}"
        )
    if len(specs) != len(modules):
        raise ValueError(f"config.effattn describes {len(specs)} layers; the model has {len(modules)}")
    integration.swap_submodels(model)
    for index, spec in enumerate(specs):
        if spec:
            new = _make(config_from_dict(spec), architecture, modules[index], model.config)
            integration.attach(modules[index], new, architecture.cache_argument)
    _finish(model, architecture, modules)


def _finish(model: PreTrainedModel, architecture: Architecture, modules: dict[int, nn.Module]) -> None:
    for embedding in _position_embeddings(model, architecture):
        integration.guard_positions(embedding)
    everywhere = all(hasattr(module, "effattn") for module in modules.values())
    if everywhere and model.config._attn_implementation == "sdpa":
        model.config._attn_implementation_internal = integration.NAME  # so that masks are [B, T], not [B, 1, T, S]


def _architecture(model: PreTrainedModel, check: bool = True) -> Architecture:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"convert_attention takes a transformers PreTrainedModel; got {type(model).__name__}")
    base = str(model.config.model_type).removeprefix("effattn_")
    if base not in ARCHITECTURES:
        raise ValueError(
            f"models of type {base!r} are not supported; supported model types: {', '.join(ARCHITECTURES)} "
            "(causal language models whose attention goes through transformers' AttentionInterface)"
        )
    architecture = ARCHITECTURES.get(base)
    if architecture.cross_attention and getattr(model.config, architecture.cross_attention, False):
        raise ValueError(f"models with cross-attention ({architecture.cross_attention}=True) are not supported")
    if check:
        _refuse_offloaded(model)
    return architecture


def _refuse_inner_conversion(model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
    if not getattr(model.config, "is_effattn", False) and any(hasattr(m, "effattn") for m in modules.values()):
        raise ValueError(
            f"an inner model of this {type(model).__name__} was converted by itself, which saving the outer one would "
            "lose: call revert_attention() on the inner model and convert the outer one"
        )


def _refuse_offloaded(model: PreTrainedModel) -> None:
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    hooked = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules())
    if offloaded or hooked:
        where = f" ({offloaded[0]} is on the meta device)" if offloaded else ""
        raise ValueError(
            f"the model is offloaded by accelerate{where}; convert it before dispatching, or save the conversion and "
            "load that with device_map"
        )


def _attention_modules(model: PreTrainedModel, architecture: Architecture) -> dict[int, nn.Module]:
    modules = architecture.attention_modules(model)
    if sorted(modules) != list(range(model.config.num_hidden_layers)):
        raise ValueError(
            f"expected one self-attention module {architecture.attention!r} in each of the "
            f"{model.config.num_hidden_layers} layers of {type(model).__name__}; found {sorted(modules)}"
        )
    _refuse_inner_conversion(model, modules)
    return modules


def _choose(number: int, layers: Iterable[int] | None, keep_softmax: Iterable[int] | None) -> list[int]:
    if layers is not None and keep_softmax is not None:
        raise ValueError("give layers= or keep_softmax=, not both")
    if layers is not None:
        chosen = _indices("layers", number, layers)
    else:
        kept = _indices("keep_softmax", number, keep_softmax or [])
        chosen = [index for index in range(number) if index not in kept]
    if not chosen:
        raise ValueError("no layer is left to convert; check layers= and keep_softmax=")
    return chosen


def _indices(name: str, number: int, given: Iterable[int]) -> list[int]:
    try:
        indices = [operator.index(index) for index in given if not isinstance(index, bool)]
    except TypeError:
        indices = None
    if indices is None or isinstance(given, str):
        raise TypeError(f"{name} must be a list of layer indices; got {given!r}")
    wrong = [index for index in indices if not -number <= index < number]
    if wrong:
        raise ValueError(f"{name} names layer {wrong[0]}; valid: 0 to {number - 1} (or −{number} to −1)")
    return sorted({index % number for index in indices})


def _make(config: MechanismConfig, architecture: Architecture, module: nn.Module, model_config: Any) -> Mechanism:
    mechanism = make_mechanism(config, HeadGeometry(*architecture.heads(module, model_config)))
    parameters = list(module.parameters())
    floating = [p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1]
    dtype = floating[0] if floating else model_config.dtype or torch.get_default_dtype()
    mechanism.train(module.training)
    if parameters[0].is_meta:
        return mechanism.to(dtype=dtype)
    return mechanism.to(device=parameters[0].device, dtype=dtype)


def _freeze_under_peft(model: PreTrainedModel, made: dict[int, Mechanism]) -> None:
    """Freeze new parameters that a PEFT adapter around the model would train but not save."""
    adapted = any("lora_" in name or ".base_layer." in name for name, _ in model.named_parameters())
    if not adapted or not any(True for mechanism in made.values() for _ in mechanism.parameters()):
        return
    for mechanism in made.values():
        mechanism.requires_grad_(False)
    logger.warning(
        "The model carries a PEFT adapter, which would not save the new parameters of converted layers, so these are "
        'frozen. To train them, convert first and pass modules_to_save=["effattn"] to the PEFT config.'
    )


def _position_embeddings(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    name = architecture.position_embedding
    return [] if name is None else [m for full, m in model.named_modules() if full.rpartition(".")[2] == name]


def register_architectures() -> None:
    """Make transformers' Auto classes know the converted twins of all supported families."""
    for name in ARCHITECTURES:
        integration.register_config(getattr(transformers, ARCHITECTURES.get(name).config_class))
    integration.set_builder(_build)
