"""The dense model that a converted one was, beside it and with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention import Mechanism
from ..convert import carries_adapter, revert_attention
from ..integration import is_learned
from ..targets import find_targets


def shared_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """Return the dense teacher of a converted model, in evaluation mode. Its weights are those of `model`, the same
    tensors, so it takes no memory of its own; they are frozen, and what is learned is in `effattn` and adapters.

    Args:
        model: A converted model that carries no adapter yet: what an adapter changes, a teacher would not have.

    Raises:
        ValueError: if no layer of `model` is converted, or it carries an adapter.
    """
    if not converted_layers(model):
        raise ValueError("the model is not converted: it would be its own teacher")
    if carries_adapter(model):
        raise ValueError("the model carries an adapter; make the teacher first")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_learned(name))
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    return revert_attention(twin).eval()


def converted_layers(model: Any) -> dict[int, torch.nn.Module]:
    """Return the attention modules of the converted layers, by layer; of a model or what PEFT made of it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = find_targets(inner).modules
    return {index: module for index, module in modules.items() if isinstance(mechanism_of(module), Mechanism)}


def mechanism_of(module: torch.nn.Module) -> Any:
    """Return the mechanism of an attention module, also where PEFT has wrapped it; None without one."""
    found = getattr(module, "effattn", None)
    if found is None or isinstance(found, Mechanism):
        return found
    return found.modules_to_save[found.active_adapter] if hasattr(found, "modules_to_save") else None
