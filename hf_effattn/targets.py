"""What of which models can be converted: families, attention modules, layers, and what is refused."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from .architectures import ARCHITECTURES, Architecture


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Return the facts about the family of `model`, or raise an error that names the supported ones."""
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
    return architecture


def attention_modules(model: PreTrainedModel, architecture: Architecture) -> dict[int, nn.Module]:
    """Return the self-attention modules of `model` by layer, or raise a ValueError if they are not all there."""
    modules = architecture.attention_modules(model)
    if sorted(modules) != list(range(model.config.num_hidden_layers)):
        raise ValueError(
            f"expected one self-attention module {architecture.attention!r} in each of the "
            f"{model.config.num_hidden_layers} layers of {type(model).__name__}; found {sorted(modules)}"
        )
    _refuse_inner_conversion(model, modules)
    return modules


def choose_layers(number: int, layers: Iterable[int] | None, keep_softmax: Iterable[int] | None) -> list[int]:
    """Return the layers to convert, of `number`: those in `layers`, or all but those in `keep_softmax`."""
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


def position_embeddings(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """Return the modules that embed learned positions: none for families with rotary positions."""
    name = architecture.position_embedding
    return [] if name is None else [m for full, m in model.named_modules() if full.rpartition(".")[2] == name]


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Raise if accelerate keeps weights elsewhere: new parameters would have no place to be."""
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    hooked = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules())
    if offloaded or hooked:
        where = f" ({offloaded[0]} is on the meta device)" if offloaded else ""
        raise ValueError(
            f"the model is offloaded by accelerate{where}; convert it before dispatching, or save the conversion and "
            "load that with device_map"
        )


def _refuse_inner_conversion(model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
    if not getattr(model.config, "is_effattn", False) and any(hasattr(m, "effattn") for m in modules.values()):
        raise ValueError(
            f"an inner model of this {type(model).__name__} was converted by itself, which saving the outer one would "
            "lose: call revert_attention() on the inner model and convert the outer one"
        )


def _indices(name: str, number: int, given: Iterable[int]) -> list[int]:
    try:
        listed = list(given)
        indices = [operator.index(index) for index in listed]
    except TypeError:
        raise TypeError(f"{name} must be a list of layer indices; got {given!r}") from None
    if any(isinstance(index, bool) for index in listed):
        raise TypeError(f"{name} must be a list of layer indices; got {listed!r}")
    wrong = [index for index in indices if not -number <= index < number]
    if wrong:
        raise ValueError(f"{name} names layer {wrong[0]}; valid: 0 to {number - 1} (or −{number} to −1)")
    return sorted({index % number for index in indices})
