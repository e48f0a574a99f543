"""Every touch of transformers' inner ways: what we register there, and what of it we rely on."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from ..cache import EffAttnCacheLayer, StaticEffAttnCacheLayer
from .attention import NAME, effattn_attention
from .binding import attach, default_implementation, detach, is_attached
from .checkpoints import is_learned
from .classes import FORMAT_VERSION, LAYER_TYPE, register_config, set_builder
from .inside import keep_inside, take_out, unload
from .masks import effattn_mask
from .natives import FULL, SLIDING, NativeLayer, native_layers
from .positions import guard_positions, unguard_positions
from .swap import become_converted, become_original, swap_submodels
from .tensor_parallel import extend_plan, num_shares, register_style

__all__ = [
    "FORMAT_VERSION",
    "FULL",
    "NAME",
    "SLIDING",
    "NativeLayer",
    "attach",
    "become_converted",
    "become_original",
    "default_implementation",
    "detach",
    "effattn_attention",
    "extend_plan",
    "guard_positions",
    "is_attached",
    "is_learned",
    "keep_inside",
    "native_layers",
    "num_shares",
    "register",
    "register_config",
    "set_builder",
    "swap_submodels",
    "take_out",
    "unguard_positions",
    "unload",
]


def register() -> None:
    """Enter our attention function, mask function, cache layer and way of sharing heads out into transformers' tables,
    under our own names."""
    AttentionInterface.register(NAME, effattn_attention)
    AttentionMaskInterface.register(NAME, effattn_mask)
    register_style()
    DYNAMIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = EffAttnCacheLayer
    STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = StaticEffAttnCacheLayer
