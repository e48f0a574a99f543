"""Recovery: a converted model learns from the dense model it was, and what it learned is kept by itself."""

from .adapters import load_adapter, merge_adapter, push_adapter, save_adapter
from .calibration import calibrate
from .guard import Diverged, Guard
from .losses import TopK, forward_kl, reverse_kl
from .stages import in_groups
from .teacher import shared_teacher
from .transfer import transfer_losses
from .windows import WindowDropout, narrowed

__all__ = [
    "Diverged",
    "Guard",
    "TopK",
    "WindowDropout",
    "calibrate",
    "forward_kl",
    "in_groups",
    "load_adapter",
    "merge_adapter",
    "narrowed",
    "push_adapter",
    "reverse_kl",
    "save_adapter",
    "shared_teacher",
    "transfer_losses",
]
