"""Config and model classes of converted models, made on the fly: `EffAttnLlamaConfig`, `EffAttnLlamaForCausalLM`, ….

Each is a subclass of transformers' own with `model_type = "effattn_<base>"` and a field `effattn` that says what each
layer became. So a saved conversion loads converted through every Auto class, and fails loudly without this package.
"""

from __future__ import annotations

import copy
import copyreg
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from .checkpoints import TYPE_PREFIX, check_keys
from .inside import refuse_saving
from .natives import native_layers

PREFIX = "EffAttn"
LAYER_TYPE = "effattn"  # registered with transformers' caches; stands in the view of a config that caches are made from
FORMAT_VERSION = 1  # of the config's field `effattn`
GUARD = "hf_effattn"  # stands for every layer type in config.json, so that plain classes refuse the file

_twins: dict[type, type] = {}
_build: Callable[[PreTrainedModel], None] | None = None


def set_builder(build: Callable[[PreTrainedModel], None]) -> None:
    """Tell how a freshly constructed model with a converted config gets its mechanisms (`hf_effattn.convert` does)."""
    global _build
    _build = build


class EffAttnConfigMixin:
    """Added to a config class: what each layer became, and the caches that fit."""

    effattn: dict[str, Any] | None
    is_effattn = True

    def __post_init__(self, **kwargs: Any) -> None:
        spec = getattr(self, "effattn", None) or {}
        guarded = kwargs.get("layer_types") or getattr(self, "layer_types", None) or [None]
        if guarded[0] == GUARD:
            kwargs.pop("layer_types", None)
            self.num_hidden_layers = len(spec["layers"])
            if spec["layer_types"] is not None:
                self.layer_types = spec["layer_types"]
        super().__post_init__(**kwargs)  # type: ignore[misc]
        register_models(type(self))  # type: ignore[arg-type]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """With `decoder=True`, return the view of the config that transformers makes caches from."""
        if not decoder or encoder or not self.effattn:
            return super().get_text_config(decoder=decoder, encoder=encoder)  # type: ignore[misc]
        view = copy.copy(self)
        pairs = zip(native_layers(self), self.effattn["layers"], strict=True)
        view.layer_types = [LAYER_TYPE if spec else native.kind for native, spec in pairs]
        return view

    def to_json_string(self, use_diff: bool = True) -> str:
        """Write the config so that plain classes of the family refuse it: see `GUARD`."""
        data = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        if data.get("effattn"):
            data["effattn"]["layer_types"] = data.get("layer_types")
            data["layer_types"] = [GUARD] * len(data["effattn"]["layers"])
            data.pop("num_hidden_layers", None)  # the bare PreTrainedConfig, which Trainer reads, then lets it pass
        return json.dumps(data, indent=2, sort_keys=True) + "\n"


class EffAttnModelMixin:
    """Added to a model class: conversion at construction, before any weights are loaded."""

    _supports_context_parallel = False
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if _build is not None and getattr(config, "effattn", None):
            _build(self)  # type: ignore[arg-type]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise learned parameters of mechanisms as documented, keeping those that were loaded."""
        if not hasattr(module, "reset_parameters") or not _belongs_to_mechanism(module):
            super()._init_weights(module)  # type: ignore[misc]
            return
        loaded = [(p, p.detach().clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        module.reset_parameters()  # type: ignore[operator]
        for parameter, value in loaded:
            parameter.copy_(value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; a converted checkpoint that lacks parameters of mechanisms is an error."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        check_keys(model, pretrained_model_name_or_path, info, kwargs)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; not with an adapter inside that `convert_attention` has loaded."""
        refuse_saving(self)  # type: ignore[arg-type]
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class TwinType(type):
    """The type of converted classes: pickle finds them through the class they are made of, not by their name."""


def _twin_of(base: Any) -> Any:
    return config_class(base) if issubclass(base, PreTrainedConfig) else model_class(base)


def _reduce_twin(twin: TwinType) -> tuple[Any, tuple[type]]:
    return _twin_of, (original_class(twin),)


copyreg.pickle(TwinType, _reduce_twin)


def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the converted twin of a config class."""
    if base not in _twins:
        namespace = {
            "__module__": __name__,
            "__annotations__": {"effattn": "dict | None"},
            "model_type": TYPE_PREFIX + base.model_type,
            "effattn": None,
        }
        _twins[base] = TwinType(PREFIX + base.__name__, (EffAttnConfigMixin, base), namespace)
    return _twins[base]


def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the converted twin of a model class."""
    if base not in _twins:
        twin = config_class(base.config_class)  # type: ignore[arg-type]
        namespace = {
            "__module__": __name__,
            "__doc__": base.__doc__,
            "__annotations__": {"config": twin},
            "config_class": twin,
            "_can_set_attn_implementation_cached_value": base._can_set_attn_implementation(),
        }
        _twins[base] = TwinType(PREFIX + base.__name__, (EffAttnModelMixin, base), namespace)
    return _twins[base]


def original_class(twin: type) -> type:
    """Return the class whose twin this is, or the class itself."""
    return twin.__mro__[2] if isinstance(twin, TwinType) else twin


def register_config(model_type: str) -> None:
    """Register the converted twin of a family's config class with AutoConfig; families this release lacks are left."""
    if model_type in CONFIG_MAPPING:
        twin = config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(twin.model_type, twin, exist_ok=True)


def register_models(twin: type[PreTrainedConfig]) -> None:
    """Register the twins of all model classes of a family in the tables of transformers, PEFT and Liger, once."""
    if "_models_registered" in twin.__dict__ or not isinstance(twin, TwinType):
        return
    twin._models_registered = True  # type: ignore[attr-defined]
    base = original_class(twin)
    for auto in vars(modeling_auto).values():
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
            continue
        mapping = auto._model_mapping
        if mapping is None or base not in mapping:
            continue
        head = mapping[base]
        if isinstance(head, type) and getattr(head, "config_class", None) is base:
            auto.register(twin, model_class(head), exist_ok=True)
            # `transformers serve` looks there; the module in place now need not be the one that was imported first.
            setattr(sys.modules["transformers"], PREFIX + head.__name__, model_class(head))
    _register_with_peft(base.model_type, twin.model_type)  # type: ignore[attr-defined]
    _register_with_liger(base.model_type, twin.model_type)  # type: ignore[attr-defined]


def _register_with_peft(model_type: str, twin_type: str) -> None:
    """Copy PEFT's per-family tables (such as LoRA's default targets) for the converted family."""
    from peft.utils import constants

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and model_type in table:
            table.setdefault(twin_type, table[model_type])


def _register_with_liger(model_type: str, twin_type: str) -> None:
    """Copy the entry of Liger's table, if it is there: without one, Trainer's `use_liger_kernel` does nothing."""
    if importlib.util.find_spec("liger_kernel") is None:
        return
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as table
    except (ImportError, RuntimeError):  # without Triton, or without a device for it
        return
    if model_type in table:
        table.setdefault(twin_type, table[model_type])


def _belongs_to_mechanism(module: nn.Module) -> bool:
    return type(module).__module__.startswith(__name__.partition(".")[0] + ".")
