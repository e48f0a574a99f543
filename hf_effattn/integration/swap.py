"""A model in memory changes its classes: from transformers' own to their converted twins, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .classes import (
    FORMAT_VERSION,
    PREFIX,
    EffAttnModelMixin,
    config_class,
    model_class,
    original_class,
    register_models,
)
from .natives import native_layers


def become_converted(model: PreTrainedModel) -> None:
    """Give `model` and its config, in place, the classes of a converted model; the config is copied first, since
    other models may share it."""
    old = model.config
    if getattr(old, "is_effattn", False):
        return
    new = copy.deepcopy(old)
    new.__class__ = config_class(type(old))
    new.effattn = {"version": FORMAT_VERSION, "layers": [None] * len(native_layers(old))}
    register_models(type(new))
    _swap(model, old, new, model_class)


def become_original(model: PreTrainedModel) -> None:
    """Undo `become_converted`."""
    config = model.config
    config.__class__ = original_class(type(config))
    del config.effattn
    if config.architectures:  # saving a converted model wrote its class name here
        config.architectures = [name.removeprefix(PREFIX) for name in config.architectures]
    _swap(model, config, config, original_class)


def swap_submodels(model: PreTrainedModel) -> None:
    """Give the inner models of a freshly constructed converted model their converted classes."""
    _swap(model, model.config, model.config, model_class)


def _swap(model: PreTrainedModel, old: Any, new: Any, twin: Callable[[Any], Any]) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is not old:
            continue
        module.config = new
        if isinstance(module, PreTrainedModel):
            if (twin is model_class) != isinstance(module, EffAttnModelMixin):
                module.__class__ = twin(type(module))
            # Kept by the name of the class. Releases differ in what they take as key, so the dict is written directly.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)
