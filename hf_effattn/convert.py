"""Conversion of a pretrained model, in place, and its way back."""

from __future__ import annotations

import logging
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
from .targets import attention_modules, choose_layers, find_architecture, position_embeddings, refuse_offloaded

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
    architecture = find_architecture(model)
    refuse_offloaded(model)
    modules = attention_modules(model, architecture)
    config = make_config(mechanism, options)
    chosen = choose_layers(len(modules), layers, keep_softmax)
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
    if not any(hasattr(module, "effattn") for module in model.modules()) and not hasattr(model.config, "effattn"):
        return model
    architecture = find_architecture(model)
    for module in attention_modules(model, architecture).values():
        if hasattr(module, "effattn"):
            integration.detach(module, model.config)
    for embedding in position_embeddings(model, architecture):
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
    modules = attention_modules(model, find_architecture(model))
    found = {index: getattr(module, "effattn", None) for index, module in sorted(modules.items())}
    specs = (getattr(model.config, "effattn", None) or {}).get("layers", [None] * len(found))
    for index, spec in enumerate(specs):
        if (spec is not None) != (found[index] is not None) or (spec and not integration.is_attached(modules[index])):
            raise RuntimeError(
                f"layer {index} is configured as {spec} but does not compute it; convert the model again"
            )
    return found


def layer_geometries(model: PreTrainedModel) -> dict[int, HeadGeometry]:
    """Return the heads of each layer."""
    architecture = find_architecture(model)
    modules = attention_modules(model, architecture)
    return {index: HeadGeometry(*architecture.heads(module, model.config)) for index, module in modules.items()}


def _build(model: PreTrainedModel) -> None:
    """Attach mechanisms to a freshly constructed model as its config says (called before weights are loaded)."""
    architecture = find_architecture(model)
    modules = attention_modules(model, architecture)
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
    for embedding in position_embeddings(model, architecture):
        integration.guard_positions(embedding)
    everywhere = all(hasattr(module, "effattn") for module in modules.values())
    if everywhere and model.config._attn_implementation == "sdpa":
        model.config._attn_implementation_internal = integration.NAME  # so that masks are [B, T], not [B, 1, T, S]


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
    learned = [parameter for mechanism in made.values() for parameter in mechanism.parameters()]
    if not adapted or not learned:
        return
    for parameter in learned:
        parameter.requires_grad_(False)
    logger.warning(
        "The model carries a PEFT adapter, which would not save the new parameters of converted layers, so these are "
        'frozen. To train them, convert first and pass modules_to_save=["effattn"] to the PEFT config.'
    )


def register_architectures() -> None:
    """Make transformers' Auto classes know the converted twins of all supported families."""
    for name in ARCHITECTURES:
        integration.register_config(getattr(transformers, ARCHITECTURES.get(name).config_class))
    integration.set_builder(_build)
