"""Convert the softmax attention of pretrained transformers models to linear or sparse attention.

Importing this package gives `PreTrainedModel` three methods, `convert_attention`, `revert_attention` and
`attention_report`, and enters names of its own into transformers' tables. No existing model changes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from . import integration
from .config import LinearConfig, SparseConfig
from .convert import convert_attention, register_architectures, revert_attention, set_adapter_loader
from .plans import Plan
from .report import attention_report
from .targets import supported_models

if TYPE_CHECKING:
    from .planning import plan

__version__ = "0.1.0"

__all__ = [
    "LinearConfig",
    "Plan",
    "SparseConfig",
    "attention_report",
    "convert_attention",
    "plan",
    "revert_attention",
    "supported_models",
]


def _load_in_place(model: PreTrainedModel, adapter: str | Path, mechanism: Any) -> None:
    """Import recovery when an adapter is asked for: it imports PEFT, which takes its time."""
    from .recovery.in_place import load_in_place

    load_in_place(model, adapter, mechanism)


integration.register()
register_architectures()
set_adapter_loader(_load_in_place)
PreTrainedModel.convert_attention = convert_attention  # type: ignore[attr-defined]
PreTrainedModel.revert_attention = revert_attention  # type: ignore[attr-defined]
PreTrainedModel.attention_report = attention_report  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Import planning when it is asked for: it needs packages that conversion does not."""
    if name == "plan":
        from .planning import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
