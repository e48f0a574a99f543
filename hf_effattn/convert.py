"""Conversion of a pretrained model, in place, and its way back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from . import integration
from .architectures import ARCHITECTURES, find_rotation, find_undo, head_counts
from .attention import HeadGeometry, Mechanism, make_mechanism
from .config import MechanismConfig, config_from_dict, make_config
from .plans import Plan
from .targets import Targets, choose_layers, find_targets, position_embeddings, refuse_offloaded

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)

_load_adapter: Callable[[PreTrainedModel, str | Path, Any], None]


def set_adapter_loader(load: Callable[[PreTrainedModel, str | Path, Any], None]) -> None:
    """Tell what loads `adapter=` of `convert_attention` (a function of `hf_effattn.recovery`, on a floor above)."""
    global _load_adapter
    _load_adapter = load


def convert_attention(
    model: Model,
    mechanism: str | MechanismConfig | Plan,
    *,
    layers: Iterable[int] | None = None,
    keep_softmax: Iterable[int] | None = None,
    adapter: str | Path | None = None,
    **options: Any,
) -> Model:
    """Replace the softmax attention of a causal language model, in place, by linear or sparse attention.

    Projections, norms, rotary, names and classes of modules stay; `generate()` gets a cache that fits. Calls add up,
    so layers may differ; converting a layer again replaces its mechanism. Every check comes before the first change.

    Args:
        model: A transformers model of a supported family.
        mechanism: "linear" or "sparse", a `LinearConfig` or `SparseConfig`, or a plan, which says it for each layer.
            With `adapter`, the name of a mechanism that it has.
        layers: Indices of the layers to convert, negative ones from the end; None for all of full attention (where a
            model has none, for all with a window of their own). The window of a converted layer replaces its own.
        keep_softmax: Indices of layers to leave as they are, all others being converted. Not together with `layers`.
        adapter: A trained recovery: a folder of `hf_effattn.recovery.save_adapter`, the name of one that ships with a
            clone of the project (as in "smollm2-135m/linear"), or the id of a repository on the Hub. It says what each
            layer becomes, in place of all that a conversion did before, and brings what was learned, frozen: feature
            maps, and LoRA inside the model. `hf_effattn.recovery.load_adapter` also loads them to be trained.
        options: Fields of `LinearConfig` or `SparseConfig`.

    Returns:
        The model itself.

    Raises:
        TypeError: if `model` is no transformers model, or an option has the wrong type.
        ValueError: for an unknown mechanism, option or value, layers out of range, and models that cannot be
            converted: unsupported families, cross-attention, offloaded weights; for a plan or an adapter of another
            model, or with options beside it. The model is then as it was.
        FileNotFoundError: for an adapter that is not there.
    """
    targets = find_targets(model)
    refuse_offloaded(model)
    chosen = {"layers": layers, "keep_softmax": keep_softmax}
    beside = [*(name for name, value in chosen.items() if value is not None), *options]
    if adapter is not None:
        _refuse_beside("an adapter", beside)
        _load_adapter(model, adapter, mechanism)
        return model
    if isinstance(mechanism, Plan):
        _refuse_beside("a plan", beside)
        found = _planned(targets, mechanism)
    else:
        config = make_config(mechanism, options)
        found = dict.fromkeys(choose_layers(targets, layers, keep_softmax), config)
    configs = {index: config.for_layer(index) for index, config in found.items()}
    made = {index: _make(configs[index], targets, index, model) for index in configs}
    _freeze_under_peft(model, made)
    integration.become_converted(model)
    model.config.effattn.pop("plan", None)
    _put(model, targets, configs, made)
    if isinstance(mechanism, Plan):
        model.config.effattn["plan"] = mechanism.to_dict()
    _finish(model, targets)
    return model


def revert_attention(model: Model) -> Model:
    """Give `model` back its softmax attention, classes and config, bit for bit; learned maps are dropped, and LoRA
    that `convert_attention` has loaded. LoRA of others stays.

    Returns:
        The model itself. A model that is not converted stays as it is.
    """
    if not any(hasattr(module, "effattn") for module in model.modules()) and not hasattr(model.config, "effattn"):
        return model
    targets = find_targets(model)
    integration.take_out(model)
    for module in targets.modules.values():
        if hasattr(module, "effattn"):
            integration.detach(module, model.config)
    for embedding in position_embeddings(model, targets.architecture):
        integration.unguard_positions(embedding)
    if model.config._attn_implementation == integration.NAME:
        model.config._attn_implementation_internal = integration.default_implementation(model)
    integration.become_original(model)
    integration.extend_plan(model)
    return model


def build_converted(model: PreTrainedModel) -> None:
    """Attach mechanisms to a freshly constructed model as its config says (called before weights are loaded)."""
    targets = find_targets(model)
    specs, version = model.config.effattn["layers"], model.config.effattn.get("version")
    if version != integration.FORMAT_VERSION:
        raise ValueError(
            f"this conversion was saved in format {version}; this hf_effattn reads format {integration.FORMAT_VERSION}"
        )
    if len(specs) != len(targets.natives):
        raise ValueError(f"config.effattn describes {len(specs)} layers; the model has {len(targets.natives)}")
    integration.swap_submodels(model)
    for index, spec in enumerate(specs):
        if spec:
            targets.attach(index, _make(config_from_dict(spec), targets, index, model))
    _finish(model, targets)


@contextmanager
def exchanged(model: PreTrainedModel, configs: dict[int, MechanismConfig]) -> Iterator[dict[int, Mechanism]]:
    """Give converted layers other mechanisms, freshly made, and afterwards the very ones that they had."""
    targets = find_targets(model)
    own = {index: targets.modules[index].effattn for index in configs}
    specs = list(model.config.effattn["layers"])
    found = {index: config.for_layer(index) for index, config in configs.items()}
    made = {index: _make(config, targets, index, model) for index, config in found.items()}
    try:
        _put(model, targets, found, made)
        yield made
    finally:
        model.config.effattn["layers"] = specs
        for index, module in own.items():
            targets.modules[index].effattn = module


def _refuse_beside(what: str, others: list[str]) -> None:
    if others:
        raise ValueError(f"{others[0]} does not go with {what}, which says all")


def _planned(targets: Targets, plan: Plan) -> dict[int, MechanismConfig]:
    """Return the configs of the layers that a plan converts, once it is known to be for such a model."""
    if any(hasattr(module, "effattn") for module in targets.modules.values()):
        raise ValueError("the model is converted already, and a plan says what becomes of all layers; revert it first")
    if plan.num_layers != len(targets.natives):
        raise ValueError(f"the plan is for a model of {plan.num_layers} layers; this one has {len(targets.natives)}")
    configs = plan.configs()
    if not configs:
        raise ValueError("the plan leaves all layers as they are")
    choose_layers(targets, configs, None)
    return configs


def _put(
    model: PreTrainedModel, targets: Targets, configs: dict[int, MechanismConfig], made: dict[int, Mechanism]
) -> None:
    for index, mechanism in made.items():
        targets.attach(index, mechanism)
        model.config.effattn["layers"][index] = configs[index].to_dict()


def _finish(model: PreTrainedModel, targets: Targets) -> None:
    for embedding in position_embeddings(model, targets.architecture):
        integration.guard_positions(embedding)
    integration.extend_plan(model)
    everywhere = all(hasattr(module, "effattn") for module in targets.modules.values())
    if everywhere and model.config._attn_implementation == integration.default_implementation(model):
        # The model's masks are then made by our function: [B, 1, 1, T] instead of [B, 1, T, S].
        model.config._attn_implementation_internal = integration.NAME


def _make(config: MechanismConfig, targets: Targets, index: int, model: PreTrainedModel) -> Mechanism:
    module = targets.modules[index]
    mechanism = make_mechanism(config, HeadGeometry(*head_counts(module, model.config)))
    mechanism.check_shares(integration.num_shares(model, module))
    if mechanism.rolls:
        mechanism.rotate = find_rotation(targets.architecture, module, model)  # type: ignore[assignment]
    if mechanism.before_rotary or mechanism.rolls:
        mechanism.undo_rotary = find_undo(targets.architecture, module)
    # Quantised projections may have no floating-point parameters, or none at all: then the model's are asked.
    parameters = [*module.parameters(), *model.parameters()]
    floating = [p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1]
    dtype: Any = floating[0] if floating else model.config.dtype or torch.get_default_dtype()
    mechanism.train(module.training)
    if parameters[0].is_meta:
        return mechanism.to(dtype=dtype)
    return mechanism.to(device=parameters[0].device, dtype=dtype)


def carries_adapter(model: PreTrainedModel) -> bool:
    """Whether PEFT has put an adapter into layers of `model`."""
    return any("lora_" in name or ".base_layer." in name for name, _ in model.named_parameters())


def _freeze_under_peft(model: PreTrainedModel, made: dict[int, Mechanism]) -> None:
    """Freeze new parameters that a PEFT adapter around the model would train but not save."""
    learned = [parameter for mechanism in made.values() for parameter in mechanism.parameters()]
    if not learned or not carries_adapter(model):
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
        integration.register_config(name)
    integration.set_builder(build_converted)
