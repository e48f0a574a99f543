"""Deliberate bugs, one at a time, to measure what a test suite notices: `--plant NAME`.

Each replaces a function of the installed package while the tests run. None is in the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

PLANTS: dict[str, Callable[[], None]] = {}


def plant(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a bug under the name of the function that plants it."""
    PLANTS[function.__name__] = function
    return function


def _layer() -> Any:
    from hf_effattn.cache import EffAttnCacheLayer

    return EffAttnCacheLayer


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by what `make` makes of it."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _wrap_attend(change: Callable[..., tuple[Any, ...]]) -> None:
    """Let `change(state, query, key, value)` change what mechanisms get."""
    from hf_effattn.attention import MECHANISMS

    def make(original: Any) -> Any:
        def attend(self: Any, state: Any, query: Any, key: Any, value: Any, call: Any) -> Any:
            return original(self, *change(state, query, key, value), call)

        return attend

    for name in MECHANISMS:
        _wrap(MECHANISMS.get(name), "attend", make)


@plant
def crop() -> None:
    """Rejected tokens stay in the state."""

    def make(_: Any) -> Any:
        def crop(self: Any, tokens_to_remove: int) -> None:
            self.num_seen += tokens_to_remove
            self.confirmed = self.pending is not None

        return crop

    _wrap(_layer(), "crop", make)


def _wrap_masks(change: Callable[[Any], Any]) -> None:
    """Let `change` change what converted layers read from masks: booleans for padding, integers for documents."""
    from hf_effattn.integration import attention

    def make(original: Any) -> Any:
        def read_mask(*args: Any) -> Any:
            segments = original(*args)
            return None if segments is None else change(segments)

        return read_mask

    _wrap(attention, "read_mask", make)


@plant
def padding() -> None:
    """Padding is taken for text."""
    _wrap_masks(lambda segments: segments.clamp(min=1) if segments.is_signed() else None)


@plant
def packed() -> None:
    """Documents packed into a row see each other."""
    _wrap_masks(lambda segments: segments > 0)


@plant
def chunk() -> None:
    """Several tokens at once forget the past."""
    _wrap_attend(lambda state, q, k, v: (None if q.shape[2] > 1 else state, q, k, v))


@plant
def decode() -> None:
    """A single token forgets the past."""
    _wrap_attend(lambda state, q, k, v: (None if q.shape[2] == 1 else state, q, k, v))


@plant
def seqlen() -> None:
    """The cache counts one token too many."""
    _wrap(_layer(), "get_seq_length", lambda original: lambda self: self.num_seen + (self.num_seen > 0))


@plant
def notsaved() -> None:
    """The parameters of mechanisms are not written."""
    from transformers import PreTrainedModel

    def make(original: Any) -> Any:
        def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
            given = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {name: tensor for name, tensor in given.items() if ".effattn." not in name}
            original(self, *args, **kwargs)

        return save_pretrained

    _wrap(PreTrainedModel, "save_pretrained", make)


@plant
def static_commit() -> None:
    """Layers of static caches keep the state after the first tokens for good."""
    from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING as MAPPING

    from hf_effattn.integration.classes import LAYER_TYPE

    def frozen(layer: Any) -> Any:
        original = layer.commit

        def commit(state: Any, tokens: Any) -> None:
            if layer.state is None:
                original(state, tokens)

        layer.commit = commit
        return layer

    registered = MAPPING[LAYER_TYPE]
    MAPPING[LAYER_TYPE] = lambda *args, **kwargs: frozen(registered(*args, **kwargs))


@plant
def recorder() -> None:
    """A class swap loses what the model can record (hidden states, attention weights)."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    from hf_effattn.integration import swap as swapping

    def make(original: Any) -> Any:
        def swap(*args: Any) -> None:
            original(*args)
            for name in [name for name in _CAN_RECORD_REGISTRY if swapping.PREFIX in name]:
                dict.pop(_CAN_RECORD_REGISTRY, name)

        return swap

    _wrap(swapping, "_swap", make)


@plant
def causal_leak() -> None:
    """Each token attends to the key after it in place of its own."""

    def change(state: Any, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        return state, q, k.roll(-1, dims=2), v.roll(-1, dims=2)

    _wrap_attend(change)


@plant
def config_view() -> None:
    """Caches are made from the model's own config, for softmax layers."""
    from hf_effattn.integration.classes import EffAttnConfigMixin

    def make(_: Any) -> Any:
        def get_text_config(self: Any, decoder: Any = None, encoder: Any = None) -> Any:
            return super(EffAttnConfigMixin, self).get_text_config(decoder=decoder, encoder=encoder)

        return get_text_config

    _wrap(EffAttnConfigMixin, "get_text_config", make)


@plant
def reorder_cache() -> None:
    """Beams are not reordered."""
    _wrap(_layer(), "reorder_cache", lambda _: lambda self, beam_idx: None)


@plant
def batch_repeat_interleave() -> None:
    """Rows are tiled in place of each being repeated."""

    def make(_: Any) -> Any:
        return lambda self, repeats: self._map(lambda x: x.repeat(repeats, *[1] * (x.ndim - 1)))

    _wrap(_layer(), "batch_repeat_interleave", make)


@plant
def reset() -> None:
    """A cache that is reset keeps its state."""

    def make(original: Any) -> Any:
        def reset(self: Any) -> None:
            state = self.state
            original(self)
            self.state = state

        return reset

    _wrap(_layer(), "reset", make)


@plant
def init_weights() -> None:
    """Parameters of mechanisms that a checkpoint lacks stay whatever the memory held."""
    from hf_effattn.integration.classes import EffAttnModelMixin

    def make(original: Any) -> Any:
        def _init_weights(self: Any, module: Any) -> None:
            if not type(module).__module__.startswith("hf_effattn."):
                original(self, module)
                return
            for parameter in module.parameters(recurse=False):
                if not getattr(parameter, "_is_hf_initialized", False):
                    parameter.data.fill_(7.0)

        return _init_weights

    _wrap(EffAttnModelMixin, "_init_weights", make)
