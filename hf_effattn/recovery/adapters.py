"""Adapter-only checkpoints: what conversion and LoRA added to a model, without the weights of its base."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .. import integration
from ..architectures import head_counts
from ..attention import HeadGeometry
from ..convert import build_converted, revert_attention
from ..integration.checkpoints import TYPE_PREFIX
from ..targets import Targets, choose_layers, find_targets, refuse_offloaded
from .adapter_files import PEFT_PREFIX, PEFT_WEIGHTS, WEIGHTS, Saved, Tensors, read, write
from .adapter_names import local
from .sharding import whole


def save_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    base: str | None = None,
    is_main_process: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Save what conversion added to `model`, and the active PEFT adapter if it carries one; none of the base weights.

    An interrupted save leaves the old checkpoint, or one that `load_adapter` refuses.

    Args:
        model: A converted model, or the `PeftModel` around it.
        folder: Made if needed; other files in it stay.
        base: Name of the base model; None for the one it was loaded from.
        is_main_process: Whether to write. Where FSDP2 has shared out the weights, all processes must call this.
        dtype: Of floating-point parameters in the files, such as torch.bfloat16 for half of the size; None for theirs.

    Raises:
        TypeError: if `model` is no transformers model, or `dtype` no floating-point type.
        ValueError: if no layer is converted, or its adapter cannot be saved: several are active, or it changes
            parameters of mechanisms otherwise than by `modules_to_save`.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"save_adapter takes a converted transformers model or PeftModel; got {type(inner).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type or None; got {dtype}")
    targets = find_targets(inner)
    if not any(hasattr(module, "effattn") for module in targets.modules.values()):
        raise ValueError("no layer of the model is converted, so there is nothing to save; see convert_attention")
    base = base or inner.config.name_or_path or None
    config, peft = _peft_parts(model, base)
    own, peft = (_gathered(found, dtype) for found in (_own_parameters(inner, peft), peft))
    if is_main_process:
        write(Path(folder), _describe(inner, targets, base), own, peft, config)


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> Any:
    """Convert `model`, in place, as the saved one was; load what was learned, and the PEFT adapter if there is one.

    A conversion that `model` has already is replaced. Every check comes before the first change: all is done to a copy
    without weights first.

    Args:
        model: The base model, from anywhere, plain or converted.
        folder: What `save_adapter` wrote, the name of a shipped adapter, or the id of a repository on the Hub.
        trainable: Whether what is loaded will be trained on. A PEFT adapter freezes the base weights in any case.

    Returns:
        A `PeftModel` if the checkpoint has an adapter, else `model` itself.

    Raises:
        TypeError: if `model` is no transformers model.
        FileNotFoundError: for a missing folder or file.
        ValueError: for a checkpoint of another format or another model; for missing, unexpected or wrongly shaped
            parameters; for a model that carries an adapter. The model is then as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"load_adapter takes the base model, a transformers model; got {type(model).__name__}")
    if _tuner_layers(model):
        raise ValueError("the model carries a PEFT adapter; merge, unload or revert it first")
    saved = read(local(folder))
    _check_base(model, saved)
    with torch.random.fork_rng(devices=[]):  # the copy draws starts that nobody needs
        _rehearse(model, saved, trainable)
    _convert(model, saved)
    state = model.state_dict()
    for key, value in saved.learned.items():
        state[key].copy_(value)
    loaded = model if saved.peft is None else _wrapped(model, saved.folder, saved.peft, trainable)
    for name, parameter in loaded.named_parameters():
        if integration.is_learned(name):
            parameter.requires_grad_(trainable and ".original_module." not in name)
    return loaded


def merge_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Merge LoRA, of a `PeftModel` or as `convert_attention` loaded it, into the weights; `save_pretrained` then works.

    Returns:
        The model without adapter; a model that carries none as it is.

    Raises:
        TypeError: if `model` is no transformers model.
        ValueError: for adapters that no weights can stand for, and others without a `PeftModel` around them.
    """
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(f"an adapter of type {config.peft_type.value} adds tokens; only weights can be merged")
        return model.merge_and_unload()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"merge_adapter takes a PeftModel or a transformers model; got {type(model).__name__}")
    if not integration.take_out(model, merge=True) and _tuner_layers(model):
        raise ValueError("the model carries its PEFT adapter inside; give the PeftModel around it")
    return model


def _tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _peft_parts(model: Any, base: str | None) -> tuple[PeftConfig | None, Tensors]:
    """Return the config of the active PEFT adapter and its tensors as PEFT names them; nothing without adapter."""
    wrapped = isinstance(model, PeftModel)
    layers = _tuner_layers(model)
    if not wrapped and not layers:
        return None, {}
    active = model.active_adapters if wrapped else [name for layer in layers for name in layer.active_adapters]
    names = sorted(set(active))
    if len(names) != 1:
        raise ValueError(f"one PEFT adapter can be saved, the active one; active: {', '.join(names) or 'none'}")
    config = copy.deepcopy(model.peft_config[names[0]])
    config.inference_mode = True
    config.base_model_name_or_path = base or config.base_model_name_or_path
    prefix = "" if wrapped else PEFT_PREFIX
    tensors = get_peft_model_state_dict(model, adapter_name=names[0])
    return config, {prefix + key: value for key, value in tensors.items()}


def _wrapped(model: Any, folder: Path, peft: Tensors, trainable: bool) -> PeftModel:
    # PEFT would raise adapters that were trained in half precision to float32.
    full = any(value.dtype == torch.float32 for value in peft.values())
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable, autocast_adapter_dtype=full)


def _own_parameters(model: PreTrainedModel, peft: Tensors) -> Tensors:
    """Return the parameters of mechanisms by their names without adapter, but those that are among `peft`."""
    found = {}
    for key, value in _learned(model).items():
        if ".base_layer." in key:
            raise ValueError(f"the PEFT adapter changes {key}; mechanisms can only be among its modules_to_save")
        name = key.replace(".effattn.original_module.", ".effattn.")
        if ".effattn.modules_to_save." not in key and PEFT_PREFIX + name not in peft:
            found[name] = value
    return found


def _gathered(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """Return whole tensors, floating-point ones as `dtype` if it is given."""
    found = {key: whole(x) for key, x in tensors.items()}
    return {key: x.to(dtype) if dtype is not None and x.is_floating_point() else x for key, x in found.items()}


def _learned(model: PreTrainedModel) -> Tensors:
    return {key: value for key, value in model.state_dict().items() if integration.is_learned(key)}


def _describe(model: PreTrainedModel, targets: Targets, base: str | None) -> dict[str, Any]:
    conversion = model.config.effattn
    layers = conversion["layers"]
    return {
        "base_model": base,
        "model_type": _model_type(model),
        "num_layers": len(layers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "effattn": {"version": conversion["version"], "layers": layers},
        "heads": [_heads(model, targets, index) if spec else None for index, spec in enumerate(layers)],
    }


def _model_type(model: PreTrainedModel) -> str:
    return str(model.config.model_type).removeprefix(TYPE_PREFIX)


def _heads(model: PreTrainedModel, targets: Targets, index: int) -> dict[str, int | None]:
    return asdict(HeadGeometry(*head_counts(targets.modules[index], model.config)))


def _check_base(model: PreTrainedModel, saved: Saved) -> None:
    """Raise a ValueError unless `model` is built as the one that was saved."""
    targets = find_targets(model)
    refuse_offloaded(model)
    said = saved.description
    kind, number = _model_type(model), len(targets.natives)
    if (kind, number) != (said["model_type"], said["num_layers"]):
        expected = f"{said['model_type']!r} with {said['num_layers']} layers"
        raise ValueError(f"the adapter in {saved.folder} is for a model of type {expected}; got {kind!r} with {number}")
    if len(saved.layers) != said["num_layers"] or len(said["heads"]) != said["num_layers"]:
        raise ValueError(f"the adapter in {saved.folder} does not describe {said['num_layers']} layers; save again")
    converted = [index for index, spec in enumerate(saved.layers) if spec]
    for index in choose_layers(targets, converted, None):
        given = _heads(model, targets, index)
        if given != said["heads"][index]:
            raise ValueError(f"layer {index} of the adapter in {saved.folder} has {said['heads'][index]}; got {given}")


def _rehearse(model: PreTrainedModel, saved: Saved, trainable: bool) -> None:
    """Do all that loading will do to a copy of `model` without weights; raise a ValueError for what does not fit."""
    skeleton: Any = _skeleton(model)
    _convert(skeleton, saved)
    saved.check_keys(WEIGHTS, saved.learned, _learned(skeleton))
    if saved.peft is not None:
        config = PeftConfig.from_pretrained(str(saved.folder))
        if config.is_prompt_learning and trainable:
            raise ValueError(f"PEFT loads adapters of type {config.peft_type.value} with trainable=False only")
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others read the base weights
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the copy; the loading itself will warn
                tuned = get_peft_model(skeleton, config)
        except Exception as error:
            raise ValueError(f"the PEFT adapter in {saved.folder} does not fit the model: {error}") from error
        expected = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        if saved.peft.keys() - expected.keys():  # then it may have embeddings, of a vocabulary that grew
            more = get_peft_model_state_dict(tuned, save_embedding_layers=True)
            expected |= {key: more[key] for key in saved.peft.keys() & more.keys()}
        saved.check_keys(PEFT_WEIGHTS, saved.peft, expected)
    saved.check_whole()


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` with all its tensors on the meta device, where they take no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.to("meta")  # of plain parameters a plain tensor, of quantised ones a parameter
        plain = isinstance(tensor, nn.Parameter) and not isinstance(empty, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty.detach(), tensor.requires_grad) if plain else empty
    return copy.deepcopy(model, memo)


def _convert(model: PreTrainedModel, saved: Saved) -> None:
    """Convert `model` to the very layers that were saved; `convert_attention` would draw random patterns anew."""
    revert_attention(model)
    integration.become_converted(model)
    model.config.effattn["layers"] = copy.deepcopy(saved.layers)
    build_converted(model)
