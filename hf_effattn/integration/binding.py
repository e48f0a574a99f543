"""Attaching a mechanism to an attention module, and handing each call its cache layer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from ..cache import CACHE_ARGUMENTS, EffAttnCacheLayer
from .attention import NAME
from .masks import refuse_padded_past
from .packing import documents_of


def attach(module: nn.Module, mechanism: nn.Module, forward: Callable[..., Any] | None = None) -> None:
    """Make `module` compute attention by `mechanism` from its next call on.

    The module gets a config of its own that names our attention function, so that a later
    `set_attn_implementation` on the model changes the softmax layers and not this one.

    Args:
        forward: `forward(module, *args, **kwargs)` for modules whose own does not call an attention function by name.
    """
    if is_attached(module):
        detach(module, module.config)
    mechanism.cache_owner = mechanism.describe()  # type: ignore[operator]
    module.effattn = mechanism
    config = copy.copy(module.config)
    config._attn_implementation_internal = NAME  # type: ignore[union-attr]
    module.config = config
    module.register_forward_pre_hook(bind_cache, with_kwargs=True)
    if forward is not None:
        module.forward = functools.partial(forward, module)


def detach(module: nn.Module, config: Any) -> None:
    """Undo `attach`; `config` is the model's, which the module shares again."""
    del module.effattn
    module.config = config
    remove_hook(module, bind_cache)
    vars(module).pop("forward", None)


def is_attached(module: nn.Module) -> bool:
    """Whether `module` is sure to compute attention by its mechanism."""
    return (
        getattr(module, "effattn", None) is not None
        and getattr(module.config, "_attn_implementation", None) == NAME
        and bind_cache in module._forward_pre_hooks.values()
    )


def default_implementation(model: Any) -> str:
    """Return the attention implementation that transformers gives `model` unasked."""
    return "sdpa" if model._supports_sdpa else "eager"


def remove_hook(module: nn.Module, hook: Any) -> None:
    """Remove a forward pre-hook by the function it calls (handles don't survive pickling)."""
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def bind_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: find the cache among the arguments and pass this layer's part on to the attention function.

    It gets the positions too, which tell of packed documents. Where the mechanism needs queries and keys before rotary,
    it gets the angles; where it reads the layer's input, what it read.
    """
    if module.effattn.undo_rotary is not None:  # type: ignore[union-attr]
        kwargs = {**kwargs, "effattn_rotary": _angles(kwargs)}
    if module.effattn.num_gates:  # type: ignore[union-attr]
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = {**kwargs, "effattn_gates": module.effattn.read_hidden(hidden)}  # type: ignore[union-attr,operator]
    cache = next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    if cache is None:
        return args, {**kwargs, "effattn_positions": kwargs.get("position_ids")}
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise TypeError(
            f"converted layers keep their state in a transformers Cache (DynamicCache); got {type(cache).__name__}"
        )
    layer = own_layer(cache, module.layer_idx, kwargs.get("attention_mask"))  # type: ignore[arg-type]
    if cache.offloading and all(isinstance(each, EffAttnCacheLayer) for each in cache.layers):
        cache.offloading = False  # nothing to offload, where transformers expects at least one layer
    if layer is next(each for each in cache.layers if isinstance(each, EffAttnCacheLayer)):  # once a call of the model
        _refuse_packing(kwargs)
        layer.beside = next((each for each in cache.layers if _is_of_softmax(each)), None)
    layer.bind(module.effattn.cache_owner)  # type: ignore[union-attr,arg-type]
    return args, {**kwargs, "effattn_layer": layer}


def _is_of_softmax(layer: Any) -> bool:
    return not isinstance(layer, EffAttnCacheLayer) and isinstance(layer, CacheLayerMixin)


def _angles(kwargs: dict[str, Any]) -> Any:
    if kwargs.get("position_embeddings") is None:
        raise ValueError("queries and keys before rotary are needed, but the layer was called without the angles")
    return kwargs["position_embeddings"]


def own_layer(cache: Cache, index: int, mask: Any = None) -> EffAttnCacheLayer:
    """Return the layer of `cache` for a converted layer.

    A foreign one is replaced, and its tokens are taken over: those that softmax layers attended to before the
    conversion, or a learned prefix.

    Args:
        mask: The attention mask of the call, which may tell that some of these tokens are padding.
    """
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model asks for layer {index}")
    layer: Any = cache.layers[index]
    if isinstance(layer, EffAttnCacheLayer):
        return layer
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"layer {index} of the cache is a {type(layer).__name__} with {layer.get_seq_length()} tokens, which a "
            "converted layer cannot continue. Pass no cache, a DynamicCache(), or DynamicCache(config=model.config)"
        )
    own = EffAttnCacheLayer()
    if layer.get_seq_length():
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[3] > layer.get_seq_length():
            past = mask[:, 0, -1, : layer.get_seq_length()]
            refuse_padded_past(past if past.dtype == torch.bool else past == 0)
        own.ingest(layer.keys, layer.values)  # type: ignore[arg-type]
    cache.layers[index] = own
    return own


def _refuse_packing(kwargs: dict[str, Any]) -> None:
    """Raise if documents are packed into rows while a cache is given: transformers then loses where they begin."""
    if kwargs.get("attention_mask") is not None or torch.compiler.is_compiling():
        return
    if documents_of(kwargs.get("position_ids")) is not None:
        raise ValueError(
            "position_ids restart within a row, so documents are packed; with a cache they would see each other. "
            "Pass use_cache=False"
        )
