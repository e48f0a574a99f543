"""The mechanisms, found by name in `MECHANISMS`: each computes attention and makes the state its cache layer holds."""

from __future__ import annotations

from ..config import MechanismConfig
from .base import MECHANISMS, Mechanism
from .by_head import ByHeadAttention
from .call import Call
from .evicting import EvictingAttention
from .geometry import HeadGeometry
from .hybrid import HybridAttention
from .linear import LinearAttention
from .rolling import RollingAttention
from .selected import SelectedAttention
from .sparse import SparseAttention
from .vertical_slash import VerticalSlashAttention

__all__ = [
    "MECHANISMS",
    "ByHeadAttention",
    "Call",
    "EvictingAttention",
    "HeadGeometry",
    "HybridAttention",
    "LinearAttention",
    "Mechanism",
    "RollingAttention",
    "SelectedAttention",
    "SparseAttention",
    "VerticalSlashAttention",
    "make_mechanism",
]


def make_mechanism(config: MechanismConfig, geometry: HeadGeometry) -> Mechanism:
    """Return the mechanism that `config` describes for a layer of this geometry."""
    return MECHANISMS.get(config.kind)(config, geometry)
