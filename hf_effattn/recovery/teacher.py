"""The dense model that a converted one was: the same modules with the same weights, in another mode."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..attention import Mechanism
from ..integration import NAME, default_implementation, is_learned
from ..integration.binding import bind_cache, remove_hook
from ..targets import find_targets

Change = tuple[Any, str, Any]  # of what, which attribute, its value


@contextmanager
def as_teacher(model: Any) -> Iterator[None]:
    """Let a converted model compute, without gradients, what its dense teacher does: all layers attend by softmax,
    adapters and dropout are off. Afterwards it is as before.

    Modules and parameters stay where they are, so the teacher takes no memory, and whatever `model` is wrapped in may
    be called: DDP, and FSDP2, which shares out the weights. The teacher stays the same as long as only parameters of
    `effattn` and adapters are trained: see `freeze_base`.

    Args:
        model: A converted model, or the `PeftModel` around it.

    Raises:
        ValueError: if no layer is converted, or an adapter cannot be left out: it is merged, or adds tokens.
    """
    modules = list(converted_layers(model).values())
    if not modules or not _inner(model).config.effattn:
        raise ValueError("the model is not converted: it would be its own teacher")
    with torch.no_grad(), _unbound(modules), _changed([*_softmax(model, modules), *_no_adapters(model)]):
        yield


def freeze_base(model: nn.Module) -> None:
    """Freeze all weights of a converted model but those of mechanisms, so that its teacher stays what it is."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_learned(name))


def converted_layers(model: Any) -> dict[int, nn.Module]:
    """Return the attention modules of the converted layers, by layer; of a model or what PEFT made of it."""
    modules = find_targets(_inner(model)).modules
    return {index: module for index, module in modules.items() if isinstance(mechanism_of(module), Mechanism)}


def mechanism_of(module: nn.Module) -> Any:
    """Return the mechanism of an attention module, also where PEFT has wrapped it; None without one."""
    found = getattr(module, "effattn", None)
    if found is None or isinstance(found, Mechanism):
        return found
    return found.modules_to_save[found.active_adapter] if hasattr(found, "modules_to_save") else None


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _softmax(model: Any, modules: list[nn.Module]) -> Iterator[Change]:
    """Yield what makes attention `modules` those of the dense model, in evaluation mode."""
    inner = _inner(model)
    yield inner.config, "effattn", None  # caches are then those of softmax layers
    if inner.config._attn_implementation == NAME:
        yield inner.config, "_attn_implementation_internal", default_implementation(inner)
    own_forward = find_targets(inner).architecture.forward is not None
    for module in modules:
        yield module, "config", inner.config
        if own_forward:
            yield module, "forward", functools.partial(type(module).forward, module)
    for module in model.modules():
        yield module, "training", False


def _no_adapters(model: Any) -> Iterator[Change]:
    """Yield what leaves adapters out. PEFT's own way also freezes their parameters, which FSDP2 would take for good."""
    active = model.active_peft_config if isinstance(model, PeftModel) else None
    if active is not None and active.is_prompt_learning:
        raise ValueError(f"an adapter of type {active.peft_type.value} adds tokens to the teacher's too")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(f"the adapter of {name} is merged into the teacher's weights; unmerge it first")
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module, "_disable_adapters", True


@contextmanager
def _changed(changes: Iterable[Change]) -> Iterator[None]:
    changes = list(changes)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def _unbound(modules: list[nn.Module]) -> Iterator[None]:
    """Hand caches to `modules` as transformers does."""
    for module in modules:
        remove_hook(module, bind_cache)
    try:
        yield
    finally:
        for module in modules:
            module.register_forward_pre_hook(bind_cache, with_kwargs=True)
