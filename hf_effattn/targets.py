"""What of which models can be converted: families, attention modules, layers, and what is refused."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedModel

from .architectures import ARCHITECTURES, REFUSED, Architecture
from .architectures.seam import Seam
from .cache import CACHE_ARGUMENTS
from .integration import FULL, SLIDING, NativeLayer, attach, native_layers


class Targets(NamedTuple):
    """What conversion works on in one model.

    Args:
        architecture: Facts about the family.
        modules: Self-attention modules by layer; layers without attention have none.
        natives: What each layer of the model is before conversion, in order.
    """

    architecture: Architecture
    modules: dict[int, nn.Module]
    natives: list[NativeLayer]

    def seam(self, index: int) -> Seam:
        """Return how the attention of layer `index` calls the attention function."""
        found = self.architecture.seam(self.modules[index])
        assert found is not None
        return found

    def attach(self, index: int, mechanism: nn.Module) -> None:
        """Let layer `index` compute its attention by `mechanism`."""
        attach(self.modules[index], mechanism, self.seam(index).forward)


def supported_models() -> list[str]:
    """Return the model types (`config.model_type`) that can be converted.

    Every name listed passes the laws of the test matrix on a tiny random model. Options of a family that are not
    supported (soft-capping, ALiBi, …) are refused when a model that has them is converted.
    """
    return ARCHITECTURES.names()


def find_targets(model: PreTrainedModel) -> Targets:
    """Return what can be converted in `model`.

    Raises:
        TypeError: if it is no transformers model.
        ValueError: for a family or a variant of it that is not supported.
    """
    architecture = find_architecture(model)
    modules = architecture.attention_modules(model)
    _refuse_inner_conversion(model, modules)
    natives = native_layers(model.config)
    if not modules:
        raise ValueError(
            f"found no causal self-attention in {type(model).__name__} of transformers {transformers.__version__} that "
            f"takes its cache as one of: {', '.join(CACHE_ARGUMENTS)}; models that only encode cannot be converted "
            "(families of encoders are supported as decoders: is_decoder=True)"
        )
    if max(modules) >= len(natives):
        raise ValueError(f"{type(model).__name__} has attention in layer {max(modules)} of {len(natives)}")
    return Targets(architecture, dict(sorted(modules.items())), natives)


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Return the facts about the family of `model`, or raise an error that names the supported ones."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"convert_attention takes a transformers PreTrainedModel; got {type(model).__name__}")
    config = model.config
    base = str(config.model_type).removeprefix("effattn_")
    if base in REFUSED:
        raise ValueError(f"models of type {base!r} cannot be converted: {REFUSED[base]}")
    if base not in ARCHITECTURES:
        text = config.get_text_config()
        inner = f" Convert its text model (type {text.model_type!r}) by itself." if text is not config else ""
        raise ValueError(
            f"models of type {base!r} are not supported.{inner} Supported model types: {', '.join(ARCHITECTURES)} "
            "(causal language models whose attention goes through transformers' AttentionInterface)"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            "models with cross-attention (is_encoder_decoder=True or add_cross_attention=True) are not supported"
        )
    architecture = ARCHITECTURES.get(base)
    reason = architecture.refusal(config) if architecture.refusal else None
    if reason:
        raise ValueError(f"this {type(model).__name__} cannot be converted: {reason}")
    return architecture


def choose_layers(targets: Targets, layers: Iterable[int] | None, keep_softmax: Iterable[int] | None) -> list[int]:
    """Return the layers to convert: those in `layers`, or all of the default but those in `keep_softmax`.

    The default is every layer of full attention; layers with a window of their own are only converted by default where
    a model has no others.
    """
    if layers is not None and keep_softmax is not None:
        raise ValueError("give layers= or keep_softmax=, not both")
    number = len(targets.natives)
    kinds = {index: targets.natives[index].kind for index in targets.modules}
    convertible = [index for index, kind in kinds.items() if kind in (FULL, SLIDING)]
    if layers is not None:
        chosen = _indices("layers", number, layers)
        wrong = [index for index in chosen if index not in convertible]
        if wrong:
            kind = targets.natives[wrong[0]].kind
            raise ValueError(
                f"layers names layer {wrong[0]}, which is of type {kind!r} and no softmax attention that can be "
                f"converted; valid: {', '.join(map(str, convertible))}"
            )
    else:
        kept = _indices("keep_softmax", number, keep_softmax or [])
        default = [index for index in convertible if kinds[index] == FULL] or convertible
        chosen = [index for index in default if index not in kept]
    if not chosen:
        raise ValueError("no layer is left to convert; check layers= and keep_softmax=")
    for index in chosen:
        _refuse_unsupported_attention(targets, index)
    return chosen


def position_embeddings(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """Return the modules that embed learned positions: none for families with rotary positions."""
    name = architecture.position_embedding
    return [] if name is None else [m for full, m in model.named_modules() if full.rpartition(".")[2] == name]


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Raise if accelerate keeps weights elsewhere: new parameters would have no place to be.

    A model wholly on the meta device is none of its doing, but a skeleton whose weights are still to come.
    """
    names = [name for name, _ in model.named_parameters()]
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    offloaded = [] if len(offloaded) == len(names) else offloaded
    hooked = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules())
    if offloaded or hooked:
        where = f" ({offloaded[0]} is on the meta device)" if offloaded else ""
        raise ValueError(
            f"the model is offloaded by accelerate{where}; convert it before dispatching, or save the conversion and "
            "load that with device_map"
        )


def _refuse_unsupported_attention(targets: Targets, index: int) -> None:
    module = targets.modules[index]
    for problem in targets.seam(index).problems(module):
        raise ValueError(
            f"layer {index} is a {type(module).__name__}, which cannot be converted: {problem}; converted layers "
            "support plain causal attention"
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
