"""Recovery: a converted model learns from the dense model it was, and what it learned is kept by itself."""

from .adapter_names import push_adapter
from .adapters import load_adapter, merge_adapter, save_adapter
from .calibration import calibrate
from .guard import Diverged, Guard
from .kept_logits import KeptLogits
from .losses import TopK, forward_kl, reverse_kl
from .stages import in_groups
from .teacher import as_teacher, freeze_base
from .transfer import transfer_losses
from .windows import WindowDropout, narrowed

__all__ = [
    "Diverged",
    "Guard",
    "KeptLogits",
    "TopK",
    "WindowDropout",
    "as_teacher",
    "calibrate",
    "forward_kl",
    "freeze_base",
    "in_groups",
    "load_adapter",
    "merge_adapter",
    "narrowed",
    "push_adapter",
    "reverse_kl",
    "save_adapter",
    "transfer_losses",
]
